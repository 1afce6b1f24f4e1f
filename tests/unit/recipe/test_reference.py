from __future__ import annotations

from pydantic import BaseModel

from tunesmith.recipe.reference import recipe_reference
from tunesmith.recipe.schema import Recipe, Source


def sections() -> list[type[BaseModel]]:
    kinds = [field.annotation for field in Recipe.model_fields.values()]
    return [Recipe, Source, *(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))]


def test_every_key_is_described_and_listed() -> None:
    page = recipe_reference()
    for section in sections():
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                continue
            assert field.description, f"{section.__name__}.{name} has no description"
            row = next(
                line
                for line in page.splitlines()
                if line.startswith(f"| `{name}` |") and field.description in line
            )
            assert row.replace("\\|", "").count("|") == 5, row
            assert "typing." not in row and "<class" not in row, row

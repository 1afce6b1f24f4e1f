"""tunesmith eval against loss and answers computed with transformers alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import warm
from tests.make_run import make_run
from tunesmith.core.errors import UserError
from tunesmith.workflows.evaluate import evaluate_model

QUESTIONS = [
    "What is the capital of France?",
    "Say the word tree.",
    "Is water wet? Answer yes or no.",
    "How much is 2 + 3? Answer with the number.",
    "Name a colour of the sky.",
]
MAX_NEW = 12


def by_hand(model: Any, tokenizer: Any, question: str, answer: str) -> tuple[float, int, str]:
    """(summed loss, supervised tokens, greedy answer) of one row, with transformers only."""
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n")
    prompt_ids, ids = (tokenizer(text, return_tensors="pt").input_ids for text in (prompt, whole))
    labels = ids.clone()
    labels[0, : prompt_ids.shape[1]] = -100
    number = int((labels != -100).sum())
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss.item()
        out = model.generate(
            prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=MAX_NEW, do_sample=False
        )
    text = tokenizer.decode(out[0, prompt_ids.shape[1] :], skip_special_tokens=True).strip()
    return loss * number, number, text


@pytest.fixture(scope="session")
def expected(smol: Path) -> list[dict[str, Any]]:
    """Rows of which the 1st and 3rd hold the model's own greedy answer, with loss and answer by hand."""
    tokenizer = AutoTokenizer.from_pretrained(smol)
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()
    found = []
    for number, question in enumerate(QUESTIONS):
        answer = by_hand(model, tokenizer, question, "x")[2] if number in (0, 2) else "Something else."
        loss, count, greedy = by_hand(model, tokenizer, question, answer)
        found.append({"row": (question, answer), "loss": loss, "tokens": count, "greedy": greedy})
    return found


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_loss_and_exact_match_equal_transformers(cli: Any, smol: Path, expected: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [entry["row"] for entry in expected])
    rows = tmp_path / "out" / "rows.jsonl"
    found = cli.json(
        "eval",
        smol,
        "--data",
        data,
        "--max-new-tokens",
        str(MAX_NEW),
        "--output",
        rows,
        "--show",
        "2",
        env=warm.COLD,
    )
    loss = sum(e["loss"] for e in expected) / sum(e["tokens"] for e in expected)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["supervised_tokens"] == sum(e["tokens"] for e in expected)
    assert (found["rows"], found["compared"], found["correct"], found["exact_match"]) == (5, 5, 2, 0.4)
    assert [m["question"] for m in found["mismatches"]] == [QUESTIONS[1], QUESTIONS[3]]
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["answer"] for row in written] == [e["greedy"] for e in expected]
    assert [row["loss_sum"] for row in written] == pytest.approx([e["loss"] for e in expected], rel=1e-4)


def test_run_adapter_and_peft_agree(tiny: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", tiny)
    rows = [("Hello there", "General"), ("2024", "nothing but a number")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), str(run.checkpoint(10) / "adapter")
    ).eval()
    by_peft = [by_hand(model, tokenizer, *row) for row in rows]
    loss = sum(x[0] for x in by_peft) / sum(x[1] for x in by_peft)
    options: dict[str, Any] = {"data": data, "max_new_tokens": MAX_NEW}
    whole = evaluate_model(str(run.path), **options)
    beside = evaluate_model(str(tiny), adapter=str(run.checkpoint(10) / "adapter"), **options)
    base = evaluate_model(str(tiny), exact_match=False, **options)
    assert whole.loss == pytest.approx(loss, rel=1e-5)
    assert beside.loss == pytest.approx(loss, rel=1e-5)
    assert abs(base.loss - loss) > 1e-2
    assert [a.answer for a in whole.answers] == [x[2] for x in by_peft]
    assert base.exact_match is None and base.compared == 0


def test_rows_left_out_are_counted(tiny: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "word " * 1100}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "no answer"}]},
    ]
    found = evaluate_model(str(tiny), data=rows, max_new_tokens=2)
    assert found.rows == 1
    assert found.skipped == {"empty": 1, "too_long": 1, "unsupervised": 1}
    assert evaluate_model(str(tiny), data=rows, max_rows=1, exact_match=False).skipped["too_long"] == 0


def test_plain_text_has_a_loss_and_no_answer(tiny: Path) -> None:
    found = evaluate_model(str(tiny), data=[{"text": "Once upon a time"}, {"text": "there was a tree"}])
    assert (found.format, found.compared, found.exact_match) == ("text", 0, None)
    assert found.loss == pytest.approx(math.log(49152), rel=0.1)


def test_system_message_of_the_run_is_used(tiny: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", tiny)
    rows = [{"instruction": "a", "input": "", "output": "b"}]
    plain = evaluate_model(str(run.path), data=rows, exact_match=False)
    told = evaluate_model(str(run.path), data=rows, exact_match=False, system="Answer in French.")
    run.recipe.write_text(run.recipe.read_text().replace("data: {", "data: {system: Answer in French., "))
    own = evaluate_model(str(run.path), data=rows, exact_match=False)
    assert own.tokens == told.tokens != plain.tokens
    assert own.loss == told.loss


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "no row can be evaluated: 1 unsupervised"),
        ('{"a": 1}\n', "no format fits the columns 'a'"),
        ('{"instruction": "a", "output": 3}\n', "line 1: 'output' is 3 (int), not text"),
    ],
)
def test_bad_rows(tiny: Path, tmp_path: Path, content: str, message: str) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(content)
    with pytest.raises(UserError) as caught:
        evaluate_model(str(tiny), data=data)
    assert message in str(caught.value)


def test_bad_adapter(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        evaluate_model(str(tiny), data=[{"text": "a"}], adapter=str(tmp_path / "none"))
    with pytest.raises(UserError, match="holds no adapter"):
        evaluate_model(str(tiny), data=[{"text": "a"}], adapter=str(tiny))


def test_command_fails_with_code_2_and_one_object(cli: Any, tiny: Path, tmp_path: Path) -> None:
    done = cli("eval", tiny, "--data", tmp_path / "none.jsonl", "--json")
    assert done.returncode == 2
    assert "does not exist" in json.loads(done.stdout)["error"]["what"]


def test_text_output(cli: Any, tiny: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [("a", "b")])
    done = cli("eval", tiny, "--data", data, "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert "exact match  0.0% (0 of 1)" in done.stdout and "expected  b" in done.stdout

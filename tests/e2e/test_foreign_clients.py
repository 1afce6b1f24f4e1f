"""Clients that others wrote, unmodified, against a real server: Node's openai, LangChain, llm, lm-eval, schemathesis.

They live in an environment of their own below TUNESMITH_TEST_CACHE (made once, with pip and npm).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.greedy import greedy
from tunesmith.model.template import encode_prompt
from tunesmith.workflows.endpoint import Endpoint, serving

CLIENTS = Path(__file__).resolve().parent.parent / "clients"
NODE_CLIENT = "openai@6.49.0"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
MODEL = "smol"
TOOLS = """{%- if tools %}<|im_start|>system
Call functions as <tool_call>{"name": ..., "arguments": ...}</tool_call>. Functions: {{ tools | tojson }}<|im_end|>
{% endif %}"""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("foreign-clients")]


@contextmanager
def with_tools(model: Path, folder: Path) -> Iterator[Endpoint]:
    """A server of the model with a template that also knows tools: without tools its prompts are the same."""
    model = shutil.copytree(model, folder / "model", symlinks=True)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(TOOLS + template)
    with serving(str(model), log=folder / "log", args=("--model-name", MODEL)) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def served(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The real model."""
    with with_tools(smol, tmp_path_factory.mktemp("foreign")) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A model that answers soon, whatever it says."""
    with with_tools(tiny, tmp_path_factory.mktemp("small")) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("TUNESMITH_TEST_CACHE")
    return Path(given) if given else tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def python(cache: Path) -> str:
    """The Python of an environment with the clients."""
    wanted = CLIENTS / "requirements.txt"
    folder = cache / f"clients-{sha256(wanted.read_bytes()).hexdigest()[:12]}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            pip = [folder / "bin" / "pip", "install", "--quiet", "--no-compile"]
            pip += ["--disable-pip-version-check", "-r", wanted]
            subprocess.run(pip, check=True)
            (folder / "made").touch()
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def node_client(cache: Path) -> str:
    """The entry file of the installed Node package."""
    folder = cache / f"node-{NODE_CLIENT.replace('@', '-')}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            subprocess.run(["npm", "install", "--silent", "--prefix", folder, NODE_CLIENT], check=True)
            (folder / "made").touch()
    return str(folder / "node_modules" / "openai" / "index.mjs")


@pytest.fixture(scope="module")
def reference(smol: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        smol, dtype=torch.float32
    ).eval(), AutoTokenizer.from_pretrained(smol)


@pytest.fixture(scope="module")
def answer(reference: Any) -> str:
    """transformers' own greedy answer of 12 tokens."""
    model, tokenizer = reference
    return tokenizer.decode(greedy(model, encode_prompt(tokenizer, QUESTION), 12), skip_special_tokens=True)


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | (env or {}))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def told(*command: str | Path, env: dict[str, str] | None = None) -> Any:
    return json.loads(run(*command, env=env).splitlines()[-1])


def test_nodes_openai(served: Endpoint, node_client: str, answer: str) -> None:
    script = CLIENTS / "use_openai.mjs"
    env = {"OPENAI_MODULE": node_client}
    found = told("node", script, f"{served.url}/v1", served.api_key, MODEL, env=env)
    assert found["text"] == found["streamed"] == found["response"] == answer
    assert found["usage"] == 12 or len(answer.split()) < 12
    assert MODEL in found["models"] and found["completion"]
    assert found["embeddings"] == [576, 576]
    assert found["refused"] == [404, "model_not_found"]


def test_langchain(served: Endpoint, python: str, answer: str, reference: Any) -> None:
    found = told(python, CLIENTS / "use_langchain.py", f"{served.url}/v1", served.api_key, MODEL)
    messages = [{"role": "system", "content": "Answer shortly."}, *QUESTION]
    model, tokenizer = reference
    wanted = greedy(model, encode_prompt(tokenizer, messages), 12)
    assert found["text"] == found["streamed"] == tokenizer.decode(wanted, skip_special_tokens=True)
    assert found["pieces"] > 2 and found["usage"] == len(wanted)
    assert set(found["structured"]) == {"name"} and len(found["structured"]["name"]) <= 12
    (call,) = found["calls"]
    assert call["name"] == "look_up" and set(call["args"]) == {"name"}


def test_llm(served: Endpoint, python: str, answer: str, tmp_path: Path) -> None:
    card = {"model_id": "ours", "model_name": MODEL, "api_base": f"{served.url}/v1", "api_key_name": "ours"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([card]))  # JSON is YAML
    (tmp_path / "keys.json").write_text(json.dumps({"ours": served.api_key}))
    env = {"LLM_USER_PATH": str(tmp_path)}
    program = str(Path(python).with_name("llm"))
    options = ("-o", "temperature", "0", "-o", "max_tokens", "12")
    for stream in ((), ("--no-stream",)):
        said = run(program, "-m", "ours", *options, *stream, QUESTION[0]["content"], env=env)
        assert said.strip() == answer.strip()


def test_lm_evals_log_likelihoods_are_transformers(
    served: Endpoint, python: str, reference: Any, smol: Path
) -> None:
    pairs = [["The capital of France is", " Paris"], ["The capital of France is", " a large green frog"]]
    pairs += [
        ["Water boils at", " 100 degrees"],
        ["1, 2, 3, 4,", " 5"],
        ["def add(a, b):\n    return", " a + b"],
    ]
    url = f"{served.url}/v1"
    found = told(python, CLIENTS / "use_lm_eval.py", url, served.api_key, MODEL, smol, json.dumps(pairs))
    model, tokenizer = reference
    for (context, rest), (value, is_greedy) in zip(pairs, found, strict=True):
        start, ids = len(tokenizer(context).input_ids), torch.tensor([tokenizer(context + rest).input_ids])
        with torch.inference_mode():
            table = model(ids).logits[0].log_softmax(-1)[start - 1 : -1]
        targets = ids[0, start:]
        assert value == pytest.approx(float(table.gather(1, targets[:, None]).sum()), abs=1e-3)
        assert is_greedy is bool((table.argmax(-1) == targets).all())


@pytest.mark.parametrize("phase", ["coverage", "fuzzing"])
def test_schemathesis_finds_no_server_error(small: Endpoint, python: str, tmp_path: Path, phase: str) -> None:
    program = str(Path(python).with_name("schemathesis"))
    done = subprocess.run(
        [
            program, "run", f"{small.url}/openapi.json", "--checks", "not_a_server_error",
            "--header", f"Authorization: Bearer {small.api_key}", "--max-examples", "15", "--seed", "1",
            "--request-timeout", "60", "--phases", phase, "--workers", "2",
        ],
        capture_output=True, text=True, timeout=500, cwd=tmp_path,
    )  # fmt: skip
    # Its generator of cases may trip over itself ("Runtime Error"); what counts is what the server answered.
    told = done.stdout[-4000:] + done.stderr[-2000:]
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated and int(generated[1]) > 100, told
    assert "Server error" not in done.stdout and "Network" not in done.stdout, told

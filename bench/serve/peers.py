"""`tunesmith serve` beside its peers: the same prompts, in turns, at 1, 8 and 32 clients.

    python bench/serve/peers.py --model DIR --peer llamacpp --peer vllm --peer fastchat:fp32 --envs ENVS

Each peer runs in an environment of its own, ENVS/NAME, made from requirements-NAME.txt beside this file with
--install; a link to one that exists will do. llama.cpp's server is a program that you have: --llama-server
and --gguf. In every repetition each server in turn is started, asked three questions whose greedy answers are
compared with transformers in fp32, warmed up, measured and stopped. Nothing is waited for without end:
--start-limit, --level-limit, and --time for the whole; what was cut is told as such. The output folder gets
results.json, results.md, latency.svg and each server's log. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from peer_report import markdown, ratios, summary
from peer_systems import OURS, PEERS, SLOW, Setting, System, ours, versions

from tunesmith.core import proc
from tunesmith.core.errors import TunesmithError
from tunesmith.core.net import EventClient, NetError, free_port, wait_until_ready
from tunesmith.core.units import GIB
from tunesmith.hub.sources import resolve_model
from tunesmith.workflows.bench_load import make_prompts
from tunesmith.workflows.bench_measure import family
from tunesmith.workflows.bench_serve import LoadOptions, measure, watched
from tunesmith.workflows.bench_serve_report import curves_svg

GREEDY_PROMPTS, GREEDY_TOKENS = 3, 64
STOP_S = 20.0
Row = dict[str, Any]


@dataclass
class Contest:
    """The measurements so far. ways: which way of a system came up; reference: ids of the greedy answers."""

    options: argparse.Namespace
    setting: Setting
    count: Callable[[list[str]], list[list[int]]]
    reference: list[list[int]]
    end: float
    runs: dict[str, list[Row]] = field(default_factory=dict)
    ways: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def turn(self, name: str, repetition: int) -> None:
        if name in self.failures or repetition >= self._repetitions(name):
            return
        if time.perf_counter() > self.end:
            self.failures.setdefault(f"{name}, repetition {repetition + 1}", "the time was up")
            return
        try:
            self.runs.setdefault(name, []).append(self._measure(name, repetition))
        except TunesmithError as error:
            self.failures[name] = error.what

    def _repetitions(self, name: str) -> int:
        usual = self.options.slow_repeat if kind(name) in SLOW else self.options.repeat
        return int(self.options.repeat_of.get(name, usual))

    def _measure(self, name: str, repetition: int) -> Row:
        while True:
            port = free_port()
            ways = systems(name, self.setting, port)
            at = self.ways.setdefault(name, 0)
            log = (
                self.options.output / "logs" / f"{name.replace(' ', '_').replace(':', '-')}-{repetition}-{at}"
            )
            try:
                with running(ways[at], port, log, self.options.start_limit) as (ready_s, pids):
                    return self._measure_running(name, ways[at], port, ready_s, pids)
            except NotUp as error:
                if at + 1 == len(ways):
                    raise
                tell(f"{name}: {error.what}; now {ways[at + 1].way}")
                self.ways[name] = at + 1

    def _measure_running(self, name: str, system: System, port: int, ready_s: float, pids: list[int]) -> Row:
        tell(f"{name}: {system.way}: ready in {ready_s:.1f} s")
        url = f"http://127.0.0.1:{port}"
        with watched(*pids) as peak:
            greedy = "" if self.runs.get(name) else self._greedy(url, system)
            found = measure(url, self._load(name, system), lambda text: tell(f"{name}: {text}"))
        rest = {"ready_s": ready_s, "peak_gib": peak.bytes / GIB, "greedy": greedy, "way": system.way}
        tell(f"{name}: peak {rest['peak_gib']:.2f} GiB; greedy: {greedy or 'not again'}")
        return found | rest | {"system": name}

    def _load(self, name: str, system: System) -> LoadOptions:
        given = self.options
        return LoadOptions(
            target=name,
            model=system.model,
            concurrency=tuple(given.concurrency),
            requests=tuple(given.slow_requests if kind(name) in SLOW else given.requests),
            limit_s=given.level_limit,
            new_tokens=given.new_tokens,
            ignore_eos=system.ignore_eos,
            seed=given.seed,
            count=lambda text: len(self.count([text])[0]),
        )

    def _greedy(self, url: str, system: System) -> str:
        """Where each greedy answer leaves the reference, in tokens; `equal` where all are the same."""
        prompts = greedy_prompts(self.options.seed)
        try:
            texts = asyncio.run(answers(url, system, prompts, self.options.level_limit))
        except (NetError, TimeoutError) as error:
            return f"no answer: {type(error).__name__}"
        found = [
            first_difference(ids, wanted)
            for ids, wanted in zip(self.count(texts), self.reference, strict=True)
        ]
        places = [str(place) for place in found if place is not None]
        return "equal" if not places else f"{len(found) - len(places)} equal, differ at {', '.join(places)}"


class NotUp(TunesmithError):
    """A server that ended, or did not answer in time, before it was measured."""


def kind(name: str) -> str:
    """`fastchat` of `fastchat:fp32`, ours of `tunesmith --weights int8`."""
    return name.partition(":")[0].partition(" ")[0]


def systems(name: str, setting: Setting, port: int) -> list[System]:
    if kind(name) == OURS:
        return ours(setting, port, *shlex.split(name)[1:])
    peer, _, precision = name.partition(":")
    return PEERS[peer](replace(setting, precision=precision or setting.precision), port)


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# -- servers ----------------------------------------------------------------------------------------------


@contextmanager
def running(system: System, port: int, log: Path, limit_s: float) -> Iterator[tuple[float, list[int]]]:
    """The system's processes: seconds from their start to the first token that was asked for, and their ids.

    Raises NotUp. All of them and what they started have ended afterwards.
    """
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | system.env
    with ExitStack() as stack:
        began = time.perf_counter()
        processes = []
        for number, command in enumerate(system.commands):
            processes.append(proc.start(command, log=Path(f"{log}-{number}.log"), env=environment))
            stack.callback(end_family, processes[-1])
        alive = lambda: all(process.poll() is None for process in processes)  # noqa: E731
        try:
            wait_until_ready(url + system.ready, alive=alive, timeout_s=limit_s)
            asyncio.run(first_token(url, system, alive, began + limit_s))
        except TunesmithError as error:
            raise NotUp(f"{error.what}; see {log}*") from None
        yield time.perf_counter() - began, [process.pid for process in processes]


def end_family(process: proc.Process) -> None:
    """Children too: a server that is killed leaves its workers behind."""
    started = family(process.pid)
    proc.stop(process, grace_s=STOP_S)
    for pid in started[1:]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def first_token(url: str, system: System, alive: Callable[[], bool], end: float) -> None:
    """Ask until one token is answered: FastChat's server is up before its worker is known to it."""
    client = EventClient(url)
    try:
        while alive():
            try:
                async with asyncio.timeout(max(0.0, end - time.perf_counter())):
                    await client.post("/v1/completions", request(system, "Hello", 1))
                return
            except NetError:
                await asyncio.sleep(0.1)
            except TimeoutError:
                raise NotUp(f"{url} answered no request in time") from None
        raise NotUp(f"the server behind {url} ended before it answered")
    finally:
        await client.close()


def request(system: System, prompt: str, max_tokens: int) -> Row:
    return {"model": system.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}


async def answers(url: str, system: System, prompts: list[str], limit_s: float) -> list[str]:
    client = EventClient(url)
    try:
        async with asyncio.timeout(limit_s):
            found = [
                await client.post("/v1/completions", request(system, prompt, GREEDY_TOKENS))
                for prompt in prompts
            ]
    finally:
        await client.close()
    return [str(answer["choices"][0]["text"]) for answer in found]


# -- the reference ----------------------------------------------------------------------------------------


def greedy_prompts(seed: int) -> list[str]:
    return make_prompts(GREEDY_PROMPTS, (60, 120), seed + 1000)


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"])


def reference_answers(folder: Path, tokenizer: Any, prompts: list[str], threads: int) -> list[list[int]]:
    """Greedy answers of transformers in fp32, each alone; their text's ids, since servers send text."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        found = model.generate(ids, do_sample=False, max_new_tokens=GREEDY_TOKENS)
        texts.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    return encode(tokenizer, texts)


def first_difference(ids: list[int], wanted: list[int]) -> int | None:
    if ids == wanted:
        return None
    pairs = zip(ids, wanted, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(wanted)))


# -- command line -----------------------------------------------------------------------------------------


def repeat_of(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    return name, int(number)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a folder, hub id or built-in name")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME[:fp32|bf16]", help=" ".join(PEERS)
    )
    parser.add_argument("--variant", action="append", default=[], help="ours again with other arguments")
    parser.add_argument("--without-ours", action="store_true", help="to see whether a peer runs")
    parser.add_argument("--serve-arg", action="append", default=[], help="for every run of ours")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every server")
    parser.add_argument("--envs", type=Path, default=Path("bench-envs"))
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--llama-server")
    parser.add_argument("--gguf")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, nargs="+", default=[6, 16, 64], help="of each level")
    parser.add_argument(
        "--slow-requests", type=int, nargs="+", default=[2, 8, 32], help=" ".join(sorted(SLOW))
    )
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--repeat-of", type=repeat_of, action="append", default=[], metavar="NAME=N")
    parser.add_argument("--slow-repeat", type=int, default=1)
    parser.add_argument("--start-limit", type=float, default=200.0, help="seconds")
    parser.add_argument("--level-limit", type=float, default=60.0, help="seconds")
    parser.add_argument("--time", type=float, default=1e9, help="seconds after which no server is started")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("bench-serve"))
    options = parser.parse_args()
    for name in options.peer:
        if kind(name) not in PEERS or name.partition(":")[2] not in ("", "fp32", "bf16"):
            parser.error(f"--peer {name}: peers are {', '.join(PEERS)}, with or without :fp32 or :bf16")
    for given in (options.requests, options.slow_requests):
        if len(given) != len(options.concurrency):
            parser.error(f"{len(given)} numbers of requests for {len(options.concurrency)} levels")
    options.repeat_of = dict(options.repeat_of)
    return options


def setting_of(options: argparse.Namespace) -> Setting:
    return Setting(
        folder=resolve_model(options.model).folder,
        precision=options.precision,
        threads=options.threads,
        most=max(options.concurrency),
        envs=options.envs.absolute(),
        install=options.install,
        llama_server=options.llama_server,
        gguf=options.gguf,
        serve_args=tuple(options.serve_arg),
    )


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # servers end with us
    began = time.perf_counter()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    from transformers import AutoTokenizer

    setting = setting_of(options)
    tokenizer = AutoTokenizer.from_pretrained(setting.folder)
    prompts = greedy_prompts(options.seed)
    reference = reference_answers(setting.folder, tokenizer, prompts, options.threads)
    contest = Contest(options, setting, partial(encode, tokenizer), reference, began + options.time)
    mine = [OURS, *(f"{OURS} {variant}" for variant in options.variant)]
    names = [*([] if options.without_ours else mine), *options.peer]
    for repetition in range(max([options.repeat, options.slow_repeat, *options.repeat_of.values()])):
        for name in names:
            contest.turn(name, repetition)
            write(contest)
    print((options.output / "results.md").read_text())


def write(contest: Contest) -> None:
    """After every server: what stops the benchmark loses nothing."""
    output = contest.options.output
    output.mkdir(parents=True, exist_ok=True)
    summaries = [
        summary(runs) | {"versions": versions(kind(name), contest.setting)}
        for name, runs in contest.runs.items()
        if runs
    ]
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine(),
        "threads": contest.options.threads,
        "load_1min": os.getloadavg()[0],
        "command": shlex.join(["python", *sys.argv]),
        "systems": summaries,
        "ours_over": ratios(summaries, OURS),
        "failures": contest.failures,
        "runs": contest.runs,
    }
    (output / "results.json").write_text(json.dumps(result, indent=1))
    (output / "results.md").write_text(markdown(result))
    if summaries:
        (output / "latency.svg").write_text(curves_svg(summaries))


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    wide = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cores = f"{os.cpu_count()} cores"
    return (
        f"{model or platform.processor()} ({cores}; {', '.join(wide)}), {memory:.0f} GiB, {platform.system()}"
    )


if __name__ == "__main__":
    main()

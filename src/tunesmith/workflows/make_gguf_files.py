"""What the process does that makes GGUF files for `gguf_files`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from tunesmith.core.errors import TunesmithError
from tunesmith.export.gguf_lora import write_gguf_lora
from tunesmith.hub.made import made_once
from tunesmith.serve import wire
from tunesmith.workflows.export_gguf import export_gguf
from tunesmith.workflows.gguf_files import GgufJob

ADAPTER_BYTES = 1 << 30


def run(jobs: str) -> str | None:
    """Make them (JSON, a list); the error that it met, as JSON."""
    try:
        for job in json.loads(jobs):
            make(GgufJob(**job))
    except (TunesmithError, OSError, ImportError) as error:
        return json.dumps(wire.error_to_plain(error))
    return None


def make(job: GgufJob) -> None:
    """Raises what `export_gguf` and `write_gguf_lora` raise."""
    if job.base is None:
        # The export checks the disk itself: it knows what it will write.
        made_once(job.name, partial(_model, job), need_bytes=0)
    else:
        made_once(job.name, partial(_adapter, job, Path(job.base)), need_bytes=ADAPTER_BYTES)


def _model(job: GgufJob, folder: Path) -> None:
    export_gguf(job.source, quant=job.quant, output=folder / "export")


def _adapter(job: GgufJob, base: Path, folder: Path) -> None:
    write_gguf_lora(Path(job.source), base, folder / "adapter.gguf")

"""Checks of the NVIDIA driver: does it answer, does it fit its library, does it fit the CUDA of images."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from tunesmith.core.checks import Check, Topic
from tunesmith.host.checks_fixes import REBOOT, blacklist_nouveau, enrol_key, hold_driver, install_driver
from tunesmith.host.checks_host import (
    COMPAT,
    IMAGE_ENV,
    SECURE_BOOT,
    Host,
    Version,
    dotted,
    first_line,
    numbers,
)
from tunesmith.host.facts import TIMED_OUT, UNKNOWN

DRIVER = Topic(
    "driver", "NVIDIA driver", "Without a driver that answers, training and serving run on the CPU."
)
LIBRARY = Topic(
    "driver-library",
    "Driver and its library",
    "When a package upgrade changes the library under a loaded kernel module, every GPU program fails until "
    "the reboot.",
)
CUDA = Topic(
    "driver-cuda",
    "Driver and CUDA of images",
    "An image built for a newer CUDA than the driver knows fails when it starts, or at the first GPU call.",
)

# The oldest driver branch of each CUDA release (NVIDIA, CUDA compatibility, minor version compatibility).
OLDEST_BRANCH = {13: 580, 12: 525, 11: 450}
FORWARD = r"Error 804|forward compatibility was attempted on non supported HW"
UNSATISFIED = r"unsatisfied condition:\s*cuda\s*>=?\s*([\d.]+)"
MISMATCH = r"Driver/library version mismatch"


def _release(driver: Version) -> str:
    """A driver's release as NVIDIA writes it: (470, 223, 2) -> 470.223.02."""
    return ".".join([*map(str, driver[:2]), *(f"{part:02}" for part in driver[2:])])


def driver(host: Host) -> Check:
    if host.gpu == "ok":
        return DRIVER.ok(_gpus_text(host))
    if host.gpu == "none":
        installed = host.smi.rc != UNKNOWN
        return DRIVER.warn(
            "no NVIDIA GPU in this machine" + (", though nvidia-smi is installed" if installed else ""),
            [],
            "That is fine for work on the CPU: data, planning, small models, the quickstart; all checks of "
            "GPUs are left out.",
        )
    if _mismatch(host):
        return DRIVER.skip("loaded, but it cannot be asked (see 'driver-library')")
    if re.search("Insufficient Permissions", host.smi.text):
        return _forbidden(host)
    return _dead(host)


def _gpus_text(host: Host) -> str:
    names = [f"{gpu.name} ({gpu.memory})" for gpu in host.gpus]
    counted = [f"{names.count(n)} x {n}" if names.count(n) > 1 else n for n in dict.fromkeys(names)]
    cuda = f", CUDA up to {dotted(host.cuda)}" if host.cuda else ""
    return f"{', '.join(counted) or 'GPU'}, driver {_release(host.driver)}{cuda}"


def _forbidden(host: Host) -> Check:
    if first_line(host.facts.answer("getenforce").stdout) == "Enforcing":
        return DRIVER.skip("nvidia-smi may not open the GPU (see 'selinux')")
    return DRIVER.fail(
        "nvidia-smi may not open the GPU: " + first_line(host.smi.text),
        [
            "ls -l /dev/nvidia*",
            "# this user has to be in the group that owns them, often 'video' or 'render':",
            'usermod -aG video,render "$SUDO_USER"',
        ],
    )


def _dead(host: Host) -> Check:
    distro, said = host.distro, first_line(host.smi.text)
    secure = re.search(r"SecureBoot enabled", host.facts.answer(SECURE_BOOT).text) is not None
    if host.smi.rc == TIMED_OUT:
        return DRIVER.fail(
            "nvidia-smi does not come back",
            ["dmesg | grep -iE 'NVRM|Xid' | tail -n 20", REBOOT],
            "A GPU that has fallen off the bus, or a fault of the card, looks like this.",
        )
    if re.search("no devices were found", host.smi.text, re.IGNORECASE):
        return DRIVER.fail(
            "the driver runs, but finds no GPU that it can use",
            ["lspci -nn | grep -i nvidia", "dmesg | grep -iE 'NVRM|Xid' | tail -n 20", REBOOT],
            "The card is loose or broken, or too old or too new for this driver; dmesg tells which.",
        )
    causes = ["nouveau holds the card"] if host.nouveau else []
    causes += ["Secure Boot refuses a kernel module without an enrolled key"] if secure else []
    if not causes:
        causes = ["no driver is installed" if host.smi.rc == UNKNOWN else "its kernel module is not loaded"]
    fix = [
        *(blacklist_nouveau(distro) if host.nouveau else []),
        *install_driver(distro),
        *(enrol_key(distro) if secure else []),
        REBOOT,
    ]
    found = "; ".join(causes) if host.smi.rc == UNKNOWN else f"{'; '.join(causes)}. nvidia-smi: {said}"
    return DRIVER.fail(found, fix)


def _mismatch(host: Host) -> bool:
    if host.saying(MISMATCH):
        return True
    library = host.saying(r"NVML library version:\s*\d")
    module = host.module_version
    # The library prints its version without the last part: 535.183 for 535.183.01.
    known = numbers(library[1].partition("version:")[2]) if library else ()
    return bool(known and module and module[: len(known)] != known)


def driver_library(host: Host) -> Check:
    if _mismatch(host):
        library = host.saying(r"NVML library version:")
        versions = [f"kernel module {_release(host.module_version)}"] if host.module_version else []
        versions += [f"library {library[1].partition(':')[2].strip()}"] if library else []
        return LIBRARY.fail(
            "the loaded kernel module and the installed library differ"
            + (f": {', '.join(versions)}" if versions else ""),
            [REBOOT, "# after the reboot, keep upgrades from doing it again:", *hold_driver(host.distro)],
        )
    if host.gpu != "ok":
        return LIBRARY.skip(host.without_gpu)
    return LIBRARY.ok(f"both {_release(host.module_version or host.driver)}")


def image_cuda(host: Host) -> Iterator[tuple[str, Version]]:
    """(image, CUDA version) of the images that name theirs."""
    for image, answer in host.subjects(IMAGE_ENV):
        found = re.search(r"\bCUDA_VERSION=(\d+\.\d+)", answer.stdout)
        if found:
            yield image, numbers(found[1])


def driver_cuda(host: Host) -> Check:
    error = _forward(host) or _refused(host)
    if error is not None:
        return error
    if not host.driver:
        return CUDA.skip(host.without_gpu)
    images = list(image_cuda(host))
    old = [(image, cuda) for image, cuda in images if host.driver[0] < OLDEST_BRANCH.get(cuda[0], 0)]
    if old:
        image, cuda = old[0]
        return CUDA.fail(
            f"driver {_release(host.driver)} is too old for CUDA {dotted(cuda)} of {image}: it takes "
            f"{OLDEST_BRANCH[cuda[0]]} or newer",
            _newer_driver_or_older_image(host),
        )
    newer = [(image, cuda) for image, cuda in images if host.cuda and cuda > host.cuda[:2]]
    if newer:
        return _minor(host, *newer[0])
    fits = f"fits {', '.join(f'{image} (CUDA {dotted(cuda)})' for image, cuda in images[:3])}"
    return CUDA.ok(f"CUDA up to {dotted(host.cuda)}; {fits if images else 'no image with CUDA found'}")


def _minor(host: Host, image: str, cuda: Version) -> Check:
    return CUDA.warn(
        f"CUDA {dotted(cuda)} of {image} is newer than the driver's {dotted(host.cuda)}",
        [
            *_newer_driver_or_older_image(host),
            "# or, within the same major version of CUDA only, run it without the check:",
            f"# docker run --gpus all -e NVIDIA_DISABLE_REQUIRE=true {shlex.quote(image)} nvidia-smi",
        ],
        "Within one major version most of it works; kernels that are compiled on the machine (PTX) do not.",
    )


def _refused(host: Host) -> Check | None:
    said = host.saying(UNSATISFIED)
    if said is None:
        return None
    found = re.search(UNSATISFIED, said[1], re.IGNORECASE)
    wanted = numbers(found[1]) if found else ()
    fix = _newer_driver_or_older_image(host)
    if wanted and host.cuda and wanted[0] == host.cuda[0]:
        fix += [
            "# or, as image and driver have the same major version of CUDA, run it without the check:",
            "# docker run --gpus all -e NVIDIA_DISABLE_REQUIRE=true IMAGE nvidia-smi",
        ]
    has = f"; driver {_release(host.driver)} has CUDA {dotted(host.cuda)}" if host.cuda else ""
    return CUDA.fail(f"a container was refused: it wants CUDA {dotted(wanted)} or newer{has}", fix)


def _forward(host: Host) -> Check | None:
    """Forward compatibility is for data-centre cards: on a GeForce the image's own libcuda breaks CUDA."""
    seen = host.saying(FORWARD)
    geforce = next((gpu.name for gpu in host.gpus if re.search(r"GeForce|TITAN|\bRTX \d{4}\b", gpu.name)), "")
    if seen is None and not (geforce and _compat_in_image(host) and not _all_fit(host)):
        return None
    return CUDA.fail(
        "Error 804: an image brings a newer libcuda than the driver"
        if seen
        else f"an image brings its own libcuda ({COMPAT}), which a {geforce} cannot use",
        [*install_driver(host.distro), REBOOT],
        "That libcuda (forward compatibility) works on data-centre cards only: on a GeForce CUDA fails with "
        "error 804. A driver as new as the image's CUDA is the remedy.",
    )


def _compat_in_image(host: Host) -> bool:
    asked = host.facts.matching(re.escape(COMPAT))
    listed = any(a.ok and "libcuda.so" in a.stdout for a in asked.values())
    return listed or any(path.startswith(f"{COMPAT}/libcuda.so") for path in host.facts.files)


def _all_fit(host: Host) -> bool:
    images = [cuda for _, cuda in image_cuda(host)]
    return bool(images and host.cuda) and all(cuda <= host.cuda[:2] for cuda in images)


def _newer_driver_or_older_image(host: Host) -> list[str]:
    known = dotted(host.cuda) or "what nvidia-smi shows"
    return [
        *install_driver(host.distro),
        REBOOT,
        f"# or, with the driver as it is, an image for CUDA {known} or older: tunesmith image build",
    ]

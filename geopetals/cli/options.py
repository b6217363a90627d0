"""Parsers of option values that several commands share; argparse shows their sentence and leaves with code 2."""

import argparse
import re
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")

_UNITS = {"": 1, **{f"{p}B": 1000**n for n, p in enumerate(("", "K", "M", "G", "T"))}}
_UNITS |= {f"{p}{suffix}": 1024**n for n, p in enumerate(("K", "M", "G", "T"), 1) for suffix in ("IB", "I")}
_UNITS |= {p: 1000**n for n, p in enumerate(("K", "M", "G", "T"), 1)}
_DTYPE_ALIASES = {
    "fp32": "float32",
    "f32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
}


def span(text: str) -> tuple[int, int]:
    """`START:END` as the half-open span of blocks [start, end); whether the model has them the command checks."""
    match = re.fullmatch(r"\s*(\d{1,6}):(\d{1,6})\s*", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no span of blocks: write START:END, for example 0:10 for the first ten."
        )
    start, end = int(match[1]), int(match[2])
    if start >= end:
        raise argparse.ArgumentTypeError(f"{text!r} holds no block: END is not included, so it must be above START.")
    return start, end


def size(text: str) -> int:
    """An amount of memory in bytes: `800MB` and `0.8GB` count in thousands, `4GiB` in 1024s, a bare number in bytes."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write a number and a unit, for example 4GiB or 800MB.")
    amount = int(float(match[1]) * factor)
    if amount < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than one byte: write a size like 4GiB or 800MB.")
    return amount


def dtype_name(text: str) -> str:
    """One of DTYPES; the usual short forms (bf16, fp16, ...) and a `torch.` in front are understood."""
    name = text.strip().lower().removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is no supported dtype: choose one of {', '.join(DTYPES)}.")
    return name


def device_name(text: str) -> str:
    """`cpu`, `cuda` or `cuda:N`; whether the machine has it is checked where torch is loaded."""
    name = text.strip().lower()
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise argparse.ArgumentTypeError(f"{text!r} is no supported device: choose cpu, cuda or cuda:N.")
    return name


def port(text: str) -> int:
    """A TCP port; 0 lets the operating system choose."""
    if not re.fullmatch(r"\d{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: write a number from 0 (any free one) to 65535.")
    return int(text)


def positive_int(text: str) -> int:
    """A count of at least one."""
    if not re.fullmatch(r"\d{1,12}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: write a whole number of at least 1.")
    return int(text)


def temperature(text: str) -> float:
    """A sampling temperature; 0 means greedy."""
    return _number(text, 0.0, 100.0, "a temperature from 0 (greedy) to 100")


def probability(text: str) -> float:
    """A share of the probability, above 0 and up to 1."""
    value = _number(text, 0.0, 1.0, "a share above 0 and up to 1")
    if value == 0:
        raise argparse.ArgumentTypeError("0 leaves no token to choose: write a share above 0 and up to 1.")
    return value


def seconds(text: str) -> float:
    """A time above 0, up to a day."""
    value = _number(text, 0.0, 86400.0, "seconds, above 0 and up to 86400")
    if value == 0:
        raise argparse.ArgumentTypeError("0 seconds are too short: write a number above 0.")
    return value


def duration(text: str) -> float:
    """A length of time in seconds, like `90s`, `30m`, `12h` or `7d`; at most ten years."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*([smhd])\s*", text)
    seconds = int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else 0
    if not 0 < seconds <= 3650 * 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no length of time: write a number and a unit, like 12h or 7d.")
    return float(seconds)


def percentile(text: str) -> float:
    """Above 0 and up to 100."""
    value = _number(text, 0.0, 100.0, "a percentile above 0 and up to 100")
    if value == 0:
        raise argparse.ArgumentTypeError("0 is no percentile: write a number above 0 and up to 100.")
    return value


def seed(text: str) -> int:
    """A seed of torch's random numbers."""
    if not re.fullmatch(r"\d{1,19}", text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: write a whole number from 0 to 2^63 - 1.")
    return int(text)


def join_token(text: str) -> str:
    """A join token, or `@FILE` that holds one: what stands on a command line is seen by everybody on the machine."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise argparse.ArgumentTypeError(
            f"cannot read {text[1:]} ({reason}): give a file with a join token."
        ) from error


def _number(text: str, low: float, high: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range: write {what}.")
    return value

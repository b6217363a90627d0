import argparse
from collections.abc import Callable

import pytest

from geopetals.cli import options


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (options.span, "0:10", (0, 10)),
        (options.span, " 7:8 ", (7, 8)),
        (options.size, "4GiB", 4 * 2**30),
        (options.size, "800MB", 800_000_000),
        (options.size, "1.5 gb", 1_500_000_000),
        (options.size, "2g", 2_000_000_000),
        (options.size, "512Ki", 512 * 1024),
        (options.size, "64B", 64),
        (options.size, "1234", 1234),
        (options.dtype_name, "float32", "float32"),
        (options.dtype_name, "torch.bfloat16", "bfloat16"),
        (options.dtype_name, "FP16", "float16"),
        (options.device_name, "cpu", "cpu"),
        (options.device_name, "cuda:1", "cuda:1"),
        (options.port, "0", 0),
        (options.port, "65535", 65535),
        (options.positive_int, "3", 3),
    ],
)
def test_what_people_write_is_understood(parse: Callable[[str], object], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (options.span, "10"),
        (options.span, "10:10"),
        (options.span, "10:2"),
        (options.span, "-1:3"),
        (options.span, "a:b"),
        (options.span, "1:2:3"),
        (options.size, "4 pounds"),
        (options.size, "GiB"),
        (options.size, "-1GB"),
        (options.size, "0"),
        (options.size, "nan"),
        (options.dtype_name, "float64"),
        (options.dtype_name, "int8"),
        (options.device_name, "gpu"),
        (options.device_name, "cuda:"),
        (options.port, "65536"),
        (options.port, "http"),
        (options.positive_int, "0"),
        (options.positive_int, "1.5"),
    ],
)
def test_the_rest_is_refused_with_one_sentence(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refusal:
        parse(text)
    assert text in str(refusal.value)
    assert "\n" not in str(refusal.value)

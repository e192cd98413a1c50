"""Reading the data set of the fixture ``coco``."""

from collections.abc import Callable

from ddetr_d2.data.coco import CocoAnnotations, CocoSource, read_annotations
from ddetr_d2.errors import UserError

import pytest


@pytest.fixture
def source(coco) -> CocoSource:
    return CocoSource("pets", str(coco.json_file), str(coco.images), "correct the path")


@pytest.fixture
def read(coco, source) -> Callable[..., CocoAnnotations]:
    """Write the content of ``coco`` and read the data set into its normal form."""

    def write_and_read(**options) -> CocoAnnotations:
        coco.write()
        return read_annotations(source, **options)

    return write_and_read


@pytest.fixture
def refusal(read) -> Callable[[], str]:
    """Write the content of ``coco``, which is going to be refused; returns the message."""

    def message() -> str:
        with pytest.raises(UserError) as caught:
            read()
        message = str(caught.value)
        assert "\n" not in message and "'pets'" in message
        return message

    return message

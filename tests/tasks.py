"""Tasks as users write them, for tests that launch real ones: three blobs of points that overlap."""

from __future__ import annotations

from textwrap import dedent, indent

BLOBS = """
{imports}
import torch
import hpsearch

class Blobs(hpsearch.Task):
    def data(self):
        generator = torch.Generator().manual_seed(0)
        y = torch.arange({n}) % 3
        x = torch.randn({n}, 4, generator=generator) + torch.nn.functional.one_hot(y, 4)
        return hpsearch.Splits(train=(x[:{a}], y[:{a}]), val=(x[{a}:{b}], y[{a}:{b}]), test=(x[{b}:], y[{b}:]))

{methods}
"""


def blobs(methods: str, *, imports: str = "", rows: tuple[int, int, int] = (500, 200, 200)) -> str:
    """The source of a task.

    Args:
        methods: of its class, `model` among them.
        imports: that they need, beside torch and hpsearch.
        rows: of train, val and test.
    """
    train, val, test = rows
    return BLOBS.format(
        imports=imports,
        n=train + val + test,
        a=train,
        b=train + val,
        methods=indent(dedent(methods).strip(), "    "),
    )

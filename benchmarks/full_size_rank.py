"""A rank of a run that counts the bytes of its weights: `python -m benchmarks.full_size_rank`.

What a rank holds of a model under ZeRO 3 is its shards, and whatever is gathered; both are looked
at each time that DeepSpeed has fetched a module's weights, forward and backward.
"""

import json
import sys
from typing import Any

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from launcher import distributed
from launcher.config import load_config
from launcher.run import _parser, main

_fetch = PartitionedParameterCoordinator.fetch_sub_module


class Count:
    """Bytes of this rank's weights."""

    def __init__(self) -> None:
        self.weights: dict[int, Any] = {}
        self.whole: set[int] = set()
        self.most = self.largest = self.gathered = 0

    def look(self) -> None:
        """Count what is there now; what was not whole at the last look has been gathered."""
        whole = {key for key, weight in self.weights.items() if weight.data.numel()}
        sizes = {key: self.weights[key].data.nbytes for key in whole}
        self.gathered += sum(sizes[key] for key in whole - self.whole)
        self.whole = whole
        shards = sum(weight.ds_tensor.nbytes for weight in self.weights.values())
        self.most = max(self.most, shards + sum(sizes.values()))
        self.largest = max(self.largest, *sizes.values(), 0)


count = Count()


def fetch(self: Any, module: Any, forward: bool) -> None:
    """DeepSpeed's, and a look at the result."""
    _fetch(self, module, forward)
    count.weights |= {p.ds_id: p for p in module.parameters(recurse=False)}
    count.look()


if __name__ == "__main__":
    PartitionedParameterCoordinator.fetch_sub_module = fetch
    code = main()
    folder = load_config(_parser().parse_args().config).run_dir
    rank = distributed.rank_before_start()
    figures = {name: getattr(count, name) for name in ("most", "largest", "gathered")}
    (folder / f"held_{rank}.json").write_text(json.dumps(figures), encoding="utf-8")
    sys.stdout.flush()
    distributed.leave(code)

"""What a sweep's runs will take, by the planner, before any of them starts."""

from collections.abc import Iterable, Iterator

import torch

from data_prep.dataset import Dataset
from launcher import machine, plan_text
from launcher.config import Config
from launcher.errors import InputError
from launcher.method import method_module, read_data
from launcher.planner import Hardware
from launcher.sweep.settings import ResourceSettings

Estimate = tuple[str, float | None]
"""Memory and time in words, and seconds; or why there is no estimate, and None."""


def estimates(configs: Iterable[Config], resources: ResourceSettings) -> Iterator[Estimate]:
    """What each run takes, on the cards that its config names or else on those of this machine.

    Runs that differ in their seed or learning rate alone are looked at once.
    """
    torch.set_num_threads(resources.threads_per_rank)
    known: dict[str, Estimate] = {}
    read: dict[str, Dataset] = {}
    for config in configs:
        alike = _alike(config)
        if alike not in known:
            try:
                known[alike] = _estimate(config, resources, read)
            except InputError as error:
                known[alike] = f"no estimate: {str(error).splitlines()[0]}", None
        yield known[alike]


def _estimate(config: Config, resources: ResourceSettings, read: dict[str, Dataset]) -> Estimate:
    module = method_module(config)
    if not hasattr(module, "footprint"):
        raise InputError(f"method {config.method} does not tell its shapes")
    hardware = machine.named(config, resources.ranks) or _found(config, resources)
    key = f"{config.method} {config.data.model_dump_json()}"
    if key not in read:
        read[key] = read_data(config, module)
    return plan_text.short(config, module, read[key], hardware)


def _found(config: Config, resources: ResourceSettings) -> Hardware:
    if not resources.gpus_per_rank:
        return machine.found(config, torch.device("cpu"), resources.ranks)
    if not torch.cuda.is_available():
        raise InputError("this machine has no GPU to look at: name the card in hardware.card")
    return machine.found(config, torch.device("cuda", 0), resources.ranks)


def _alike(config: Config) -> str:
    run = config.run.model_copy(update={"name": "", "seed": 0})
    train = config.train.model_copy(update={"lr": 1.0})
    return config.model_copy(update={"run": run, "train": train}).model_dump_json()

"""The state of a run: weights and optimiser in one safetensors file, written whole or not at all."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from sglang_metasoft.train.prepare import write_atomically

NAME = "checkpoint.safetensors"


def save(
    folder: Path,
    module: torch.nn.Module,
    average: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    fingerprint: dict,
) -> None:
    """Replace the last checkpoint.

    Args:
        average: of the module's weights over the steps.

    Raises:
        ValueError: it could not be written; the last one is as it was.
    """
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, owner in (("module", module), ("average", average))
        for name, tensor in owner.state_dict().items()
    }
    names = [name for name, _ in module.named_parameters()]
    parameters = dict(module.named_parameters())
    for name in names:
        for key, tensor in optimiser.state.get(parameters[name], {}).items():
            tensors[f"optimiser.{name}.{key}"] = torch.as_tensor(tensor).detach().cpu().contiguous()
    metadata = {"step": str(step), "settings": json.dumps(fingerprint)}
    write_atomically(folder / NAME, lambda path: save_file(tensors, path, metadata=metadata))


def restore(
    folder: Path,
    module: torch.nn.Module,
    average: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    fingerprint: dict,
) -> int:
    """Load the last checkpoint, if there is one.

    Returns:
        Steps done; 0 without a checkpoint.

    Raises:
        ValueError: the checkpoint is damaged or of a run with other settings; the differing ones are named.
    """
    file = folder / NAME
    if not file.is_file():
        return 0
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
        tensors = load_file(file)
        step, settings = int(metadata["step"]), json.loads(metadata["settings"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"train output: {file} cannot be read: {error}; delete it to start again") from None
    different = {k: (v, fingerprint[k]) for k, v in settings.items() if fingerprint.get(k) != v}
    if different:
        details = ", ".join(f"{name} {a} there, {b} here" for name, (a, b) in different.items())
        raise ValueError(f"train output: {file} is of a run with other settings: {details}")
    for part, owner in (("module.", module), ("average.", average)):
        owner.load_state_dict({k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)})
    for name, parameter in module.named_parameters():
        start = f"optimiser.{name}."
        state = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        if state:
            optimiser.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
    return step

"""One optimizer step after another on a model; `roberta_pln/training` says which, and when."""

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from roberta_pln.backends import BACKENDS
from roberta_pln.checks import InputError
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.data.batches import Arrays
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.pt import weights
from roberta_pln.pt.losses import check_labels, next_labels
from roberta_pln.pt.policy import widened
from roberta_pln.pt.pretrained import RobertaPreLayerNormPreTrainedModel
from roberta_pln.schema import LM_HEADS
from roberta_pln.training.recipe import CLIP_EPSILON, Recipe
from roberta_pln.training.shares import LABELS, Share, counted, share_out
from roberta_pln.training.state import Snapshot, Tensors

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells every process that it starts."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""How PyTorch names AdamW's moments."""


class Trainer:
    """A model, and the optimizer that trains it.

    Args:
        model: one of this package; its parameters become float32, or float64, as the recipe says.
        recipe: how weights follow gradients.
        parallel: with `ddp` every process computes its share of each batch, with `fsdp` it also holds no more than its
            share of parameters, gradients and moments. The processes are PyTorch's default group, which is made from
            what torchrun tells if there is none. None is one process.

    Raises:
        InputError: when `parallel` is something else, or nothing tells of processes.
    """

    fixed_shapes = False
    """Whether every new shape of a batch costs time once."""

    def __init__(self, model: RobertaPreLayerNormPreTrainedModel, recipe: Recipe, parallel: str | None = None) -> None:
        self.model, self.recipe, self.steps = model, recipe, 0
        self.parallel, self.head = parallel, getattr(model, "head", "")
        self.rank, self.replicas = meet(parallel)
        if recipe.freeze:
            model.freeze(*recipe.freeze)
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        model.to(getattr(torch, recipe.parameter_dtype))
        if parallel == "fsdp":
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of changes in place, which nothing makes
            for layer in model.base_model.encoder.layer:
                fully_shard(layer)
            fully_shard(model)  # what is left: embeddings and head, which may share a table
        if next(model.parameters()).is_meta:
            model.to_empty(device=own_device())
            model.tie_weights()  # every name has got memory of its own
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        decayed = [parameter for parameter in self.parameters if recipe.decays(tuple(parameter.shape))]
        others = [parameter for parameter in self.parameters if not recipe.decays(tuple(parameter.shape))]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=(recipe.beta_1, recipe.beta_2),
            eps=recipe.epsilon,
            fused=True,  # one pass over memory, not a dozen
        )

    @classmethod
    def build(
        cls, config: RobertaPreLayerNormConfig, head: str, recipe: Recipe, parallel: str | None = None
    ) -> "Trainer":
        """A trainer for a new model, whose weights `restore` is to bring.

        Args:
            config: the model's.
            head: one of `schema.HEADS`.
            recipe: how weights follow gradients.
            parallel: see the class.

        Raises:
            InputError: see the class.
        """
        with weights.left_blank():
            model = BACKENDS["pt"].model_class(head)(config)
        return cls(model, recipe, parallel)

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all of them have made."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.parallel:
            dist.barrier()

    def step(self, batch: Arrays, rate: float) -> Tensor:
        """Take one step.

        Args:
            batch: arguments of the model with labels, in NumPy, of all devices together.
            rate: the learning rate.

        Returns:
            The loss of the whole batch before the step, () of this framework; it may still be computed when this
            returns, and `float` waits for it.
        """
        self.model.train()
        self.optimizer.zero_grad()
        count = self.recipe.accumulation
        shares = share_out(batch, count * self.replicas, self.head)
        own = range(self.rank * count, (self.rank + 1) * count)
        losses = []
        for part in own:
            # Gradients stay with their process until the last part; in FSDP that would take the memory of all shards.
            alone = self.parallel == "ddp" and part != own[-1]
            with self._run.no_sync() if alone else nullcontext():
                losses.append(self._backward(shares[part], part))
        loss = torch.stack(losses).sum()
        if self.parallel:
            dist.all_reduce(loss)
        self._update(rate)
        self.steps += 1
        return loss

    def predict(self, batch: Arrays) -> Arrays:
        """What the model says of every row of a batch, in evaluation mode, on every process.

        Returns:
            The logits by their names, at least float32; of a language model, which needs labels, instead for each
            label `losses`, float, -log softmax(logits)[label], and `best`, the index of the highest logit, both of the
            shape of the labels, zero where there is none.
        """
        self.model.eval()
        rows = np.array_split(np.arange(len(batch["input_ids"])), self.replicas)[self.rank]
        if self.head in LM_HEADS and "labels" in batch:
            batch = {**batch, "labels": counted(batch, self.head)}
        own = {name: array[rows] if len(rows) else array[:1] for name, array in batch.items()}  # all take part
        inputs = self._tensors(own)
        labels = [inputs.pop(name) for name in LABELS if name in inputs]
        with torch.no_grad(), self._precision():
            if self.head not in LM_HEADS:
                record = self.model(**inputs, return_dict=True)
                found = {name: widened(value) for name, value in record.items() if name.endswith("logits")}
            elif labels:
                found = scores(self.model, inputs, labels[0])
            else:
                raise InputError(f"to predict, a language model must have labels, got {', '.join(inputs)}")
        arrays = {name: weights.to_array(value) for name, value in found.items()}
        if not self.parallel:
            return arrays
        parts: list[Arrays] = [{}] * self.replicas
        dist.all_gather_object(parts, {name: array[: len(rows)] for name, array in arrays.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in arrays}

    def snapshot(self) -> Snapshot:
        """The state in canonical tensors, on every process; all of them call it together."""
        states: tuple[Tensors, ...] = ({}, {}, {})
        for name, parameter in self._named():
            moments = self._moments(parameter) or (torch.zeros_like(parameter),) * 2
            for tensors, tensor in zip(states, (parameter, *moments), strict=True):
                tensors[name] = whole(tensor)
        return Snapshot(self.steps, *states)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a state.

        Raises:
            InputError: when it is that of another head or config.
        """
        snapshot.require(self.model.parameters_of_schema)
        self.steps = snapshot.step
        self.optimizer.state.clear()
        for name, parameter in self._named():
            fill(parameter, snapshot.weights[name])
            if moments := self._moments(parameter):
                fill(moments[0], snapshot.first[name])
                fill(moments[1], snapshot.second[name])

    # ------------------------------------------------------------- what a step is made of

    @functools.cached_property
    def _run(self) -> nn.Module:
        """What a step calls; made at the first one, when it is known what is frozen."""
        if self.parallel != "ddp":
            return self.model
        config = self.model.config
        unused = config.position_embedding_type != "absolute" or config.add_cross_attention
        return DistributedDataParallel(self.model, gradient_as_bucket_view=True, find_unused_parameters=unused)

    def _backward(self, share: Share, part: int) -> Tensor:
        """Add the gradients of a part of the batch; what the part adds to the loss."""
        with seeded(self.recipe.dropout_seed(self.steps, part), self.device), self._precision():
            loss = self._run(**self._tensors(share.arrays), return_dict=True).loss
        scale = share.weight * self.replicas  # the processes' gradients are averaged
        (loss if scale == 1 else loss * scale).backward()  # of the loss itself the way back is shorter
        return loss.detach() * share.weight

    @torch.no_grad()
    def _update(self, rate: float) -> None:
        """Move the parameters along their gradients, clipped."""
        trained = [parameter for parameter in self.parameters if self._moments(parameter)]
        for parameter in trained:
            if parameter.grad is None:  # the loss does not depend on it; PyTorch would not let it decay
                parameter.grad = torch.zeros_like(parameter)
        if self.recipe.clip is not None:
            gradients = [local(parameter.grad) for parameter in trained]
            norm = nn.utils.get_total_norm(gradients)
            if self.parallel == "fsdp":
                dist.all_reduce(norm.square_())
                norm.sqrt_()
            torch._foreach_mul_(gradients, (self.recipe.clip / (norm + CLIP_EPSILON)).clamp(max=1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def _moments(self, parameter: nn.Parameter) -> tuple[Tensor, ...]:
        """AdamW's two moments of a parameter, made when they are first asked for; none of a frozen one."""
        state = self.optimizer.state
        if not parameter.requires_grad:
            state.pop(parameter, None)
            return ()
        if parameter not in state:  # all parameters count the same steps; PyTorch begins with each one's first gradient
            step = torch.tensor(float(self.steps), device=self.device)
            state[parameter] = {"step": step, **{name: torch.zeros_like(parameter) for name in MOMENTS}}
        return tuple(state[parameter][name] for name in MOMENTS)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters by canonical name."""
        if self.parallel == "fsdp":
            self.model.reshard()  # after a forward pass the parameters are whole until the backward pass
        for name, parameter in self.model.parameters_of_schema.items():
            yield name, weights.get(self.model, parameter)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    def _tensors(self, arrays: Arrays) -> dict[str, Tensor]:
        return {name: weights.to_tensor(array).to(self.device) for name, array in arrays.items()}


def meet(parallel: str | None) -> tuple[int, int]:
    """The number of this process, and how many there are."""
    if parallel is None:
        return 0, 1
    if parallel not in ("ddp", "fsdp"):
        raise InputError(f"parallel must be ddp or fsdp, or None for one process, got {parallel!r}")
    if not dist.is_initialized():
        missing = [name for name in VARIABLES if name not in os.environ]
        if missing:
            raise InputError(
                f"parallel={parallel!r} needs to know its processes, got no {', '.join(missing)} in the environment: "
                f"start them with torchrun, as in `torchrun --nproc-per-node=2 program.py`"
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(own_device())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def own_device() -> torch.device:
    """The GPU of this process, or the processor."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Have PyTorch's own generators, which dropout draws from, draw from a seed, and then go on as if they had not."""
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type=device.type):
        torch.manual_seed(seed)
        yield


def scores(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The `losses` and `best` of a language model, see `Trainer.predict`; for (B, T) labels both (B, T)."""
    causal = model.head == "ForCausalLM"
    targets = next_labels(labels) if causal else labels
    chosen = targets != IGNORE_INDEX
    # Only what has a label is decoded: all logits would take more memory than a step of training.
    handle = model.lm_head.register_forward_pre_hook(lambda _, arguments: (arguments[0][chosen],))
    try:
        logits = model(**inputs, return_dict=True).logits  # (M, V)
    finally:
        handle.remove()
    check_labels("labels", targets, logits.shape[-1])
    logits = widened(logits)
    losses, best = torch.zeros_like(targets, dtype=logits.dtype), torch.zeros_like(targets)
    losses[chosen] = F.cross_entropy(logits, targets[chosen], reduction="none")
    best[chosen] = logits.argmax(-1)
    found = {"losses": losses, "best": best}
    return {name: F.pad(value[:, :-1], (1, 0)) if causal else value for name, value in found.items()}


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> np.ndarray:
    """A copy of all of a tensor in NumPy."""
    return np.array(weights.to_array(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor))


@torch.no_grad()
def fill(tensor: Tensor, array: np.ndarray) -> None:
    """Put values in place; where this process holds a part of a tensor, the rows that are its own."""
    values = weights.to_tensor(array)
    if isinstance(tensor, DTensor):
        parts = values.chunk(tensor.device_mesh.size())
        number = tensor.device_mesh.get_local_rank()
        values = parts[number] if number < len(parts) else values[:0]
    local(tensor).copy_(values)

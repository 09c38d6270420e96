"""Deep Gradient Compression: of each gradient only the largest 0.1 % is sent, the rest waits until it is large enough.

Momentum correction, local clipping, momentum factor masking and a warm-up of the sparsity keep the accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from efficientdnns.data.split import Batch, generator
from efficientdnns.errors import ConfigurationError
from efficientdnns.method import Paper, Ratio, TrainingMethod
from efficientdnns.parts.sparse_gradients import (
    Message,
    Part,
    all_gather_bytes,
    bytes_of,
    encode,
    entries_to_send,
    mean,
    pack,
    select_exact,
    select_sampled,
    unpack,
)
from efficientdnns.session import Session
from efficientdnns.training import Callback, Trainer

WARMUP = (0.75, 0.9375, 0.984375, 0.996)
"""Sparsities of the warm-up."""


def sparsity_at(epoch: float, sparsity: float = 0.999, warmup_epochs: float = 4) -> float:
    """The sparsity after ``epoch`` epochs: the steps of `WARMUP` share ``warmup_epochs``, then ``sparsity`` holds."""
    if epoch >= warmup_epochs:
        return sparsity
    return min(sparsity, WARMUP[int(epoch / warmup_epochs * len(WARMUP))])


def accumulate(u: Tensor, v: Tensor, gradient: Tensor, momentum: float, nesterov: bool = False) -> None:
    r"""Momentum correction, in place: :math:`u \leftarrow m u + g,\; v \leftarrow v + u`.

    With Nesterov's momentum :math:`u \leftarrow m (u + g),\; v \leftarrow v + u + g`.
    """
    if nesterov:
        u.add_(gradient).mul_(momentum)
        v.add_(u).add_(gradient)
    else:
        u.mul_(momentum).add_(gradient)
        v.add_(u)


def local_threshold(threshold: float, workers: int, *, averaged: bool = True) -> float:
    r"""What one worker clips its gradient's norm to, so that the sum of N has about the norm ``threshold``.

    :math:`thr \cdot N^{-1/2}` where gradients are divided by N before and added in the exchange, and
    :math:`thr \cdot N^{1/2}` where the exchange averages (``averaged``), as here.
    """
    return threshold * workers ** (0.5 if averaged else -0.5)


class Worker:
    """One worker's memory: velocity u and unsent rest v of every tensor that is sent sparsely."""

    def __init__(self, method: DeepGradientCompression, parameters: Mapping[str, Tensor]) -> None:
        self.method = method
        sparse = {name: tensor for name, tensor in parameters.items() if tensor.dim() >= method.min_dim}
        # Entries are addressed by their position, in whatever layout the gradients come.
        self.u = {name: torch.zeros(tensor.shape, device=tensor.device) for name, tensor in sparse.items()}
        self.v = {name: torch.zeros(tensor.shape, device=tensor.device) for name, tensor in sparse.items()}

    @torch.no_grad()
    def compress(
        self,
        gradients: Mapping[str, Tensor],
        sparsity: float,
        clip_norm: float | None = None,
        random: torch.Generator | None = None,
    ) -> dict[str, Part]:
        """What the worker sends of its gradients, which are means over its own samples."""
        method = self.method
        share = 1.0
        if clip_norm is not None:
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
            share = min(1.0, clip_norm / (float(norm) + 1e-6))
        parts: dict[str, Part] = {}
        for name, gradient in gradients.items():
            gradient = gradient.detach().float()
            if share < 1:
                gradient = gradient * share
            if name not in self.u:
                parts[name] = gradient
                continue
            u, v = self.u[name], self.v[name]
            if method.momentum_correction:
                accumulate(u, v, gradient, method.momentum, method.nesterov)
            else:
                v.add_(gradient)
            rest, count = v.flatten(), entries_to_send(v.numel(), sparsity)
            if method.selection == "sampled":
                positions = select_sampled(rest, count, method.sample_ratio, random)
            else:
                positions = select_exact(rest, count)
            parts[name] = encode(positions, rest[positions])
            v.view(-1)[positions] = 0
            if method.momentum_masking:
                u.view(-1)[positions] = 0
        return parts

    def to_vector(self) -> Tensor:
        """All of u and v as one vector."""
        tensors = [tensor.flatten() for tensor in (*self.u.values(), *self.v.values())]
        return torch.cat(tensors) if tensors else torch.zeros(0)

    def load_vector(self, vector: Tensor) -> None:
        """Undo `to_vector`."""
        for tensor in (*self.u.values(), *self.v.values()):
            tensor.copy_(vector[: tensor.numel()].view_as(tensor))
            vector = vector[tensor.numel() :]


class DeepGradientCompression(TrainingMethod):
    r"""Deep Gradient Compression, `Lin et al., ICLR 2018 <https://arxiv.org/abs/1712.01887>`_.

    Every step, worker k adds its gradient :math:`g_k` (the mean over its samples) to a velocity and that to what it has
    not sent yet, and sends the entries that are largest in magnitude:

    .. math::
        u \leftarrow m u + g_k,\quad v \leftarrow v + u,\quad M = [\,|v| > thr\,],\quad
        \text{send } v M,\quad v \leftarrow v (1 - M),\quad u \leftarrow u (1 - M)

    thr lets the share 1 - s of each tensor pass. All gather what the others sent, and every network takes the step
    :math:`w \leftarrow w - \eta \frac1N \sum_k v_k M_k`: plain SGD, the momentum is in u.

    Under ``torchrun`` or ``accelerate launch`` this is a communication hook of ``DistributedDataParallel``; in one process
    ``workers`` are simulated, each with its part of the batch. The report says what was sent: 32-bit values with 16-bit
    run lengths, dense tensors, warm-up, all of it. (On CPUs, ``accelerate launch`` starts several processes only through
    MPI; ``torchrun --nproc_per_node 4 -m efficientdnns run ...`` needs none.)

    With s = 0 and no masking this is dense SGD with momentum; with masking u is cleared in every step and it is SGD without.

    Deviations:
        The mean over workers is taken where the paper adds gradients that are divided by N already; the local clipping
        threshold is multiplied by the root of N accordingly. As in the official code, tensors of fewer dimensions than
        ``min_dim`` are sent dense with ordinary momentum, and weight decay is added after the exchange with a momentum
        of its own. Among too many sampled entries the largest are kept (the official code keeps arbitrary ones). One
        exchange a step, after the last bucket, because clipping needs the whole gradient. Batch-norm statistics are
        each process's own; simulated workers share theirs.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="deep-gradient-compression",
        title="Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed Training",
        authors="Yujun Lin, Song Han, Huizi Mao, Yu Wang, William J. Dally",
        venue="ICLR",
        year=2018,
        url="https://arxiv.org/abs/1712.01887",
    )
    kind: ClassVar[str] = "distributed"
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 1, "warmup_epochs": 0.5, "workers": 2}

    sparsity: Ratio = 0.999
    """s, the share of each tensor that is not sent."""
    warmup_epochs: NonNegativeFloat = 4
    """Epochs over which the sparsity rises: 75 %, 93.75 %, 98.4375 %, 99.6 %."""
    momentum: Ratio = 0.9
    """m."""
    nesterov: bool = False
    """Nesterov's momentum."""
    momentum_correction: bool = True
    """Accumulate velocities; False is gradient dropping: gradients accumulate, momentum follows the exchange."""
    momentum_masking: bool = True
    """Clear the velocity of what was sent."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the mean gradient, kept by local clipping; None takes the training settings' limit."""
    selection: Literal["exact", "sampled"] = "sampled"
    """Entries above a threshold that a sample gives (0.8 to 1.3 k of them), or exactly the k largest."""
    sample_ratio: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the entries in the sample."""
    min_dim: PositiveInt = 2
    """Tensors of fewer dimensions (biases, batch norm) are sent dense; 1 sends every tensor sparsely."""
    workers: PositiveInt = 1
    """Simulated workers of one process; each takes its part of every batch."""

    def settings(self) -> dict[str, Any]:
        # Momentum, decay and clipping happen here; the optimizer only takes the step.
        own = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": None}
        return {**super().settings(), **own}

    def check(self, session: Session) -> None:
        super().check(session)
        processes = session.accelerator.num_processes
        if self.optimizer not in (None, "sgd"):
            raise ConfigurationError(f"{self.name} takes plain SGD steps, not {self.optimizer}; leave out optimizer")
        if session.settings.mixed_precision == "fp16":
            raise ConfigurationError(f"{self.name} compresses unscaled gradients; write mixed_precision: bf16 or no")
        if self.workers > 1 and processes > 1:
            raise ConfigurationError(f"{self.name} has {processes} real workers; leave out workers={self.workers}")
        batch_size = self.batch_size or session.settings.batch_size
        if batch_size < self.workers:
            raise ConfigurationError(
                f"{self.name}: batch_size is {batch_size}, expected at least {self.workers}, one sample for each worker"
            )

    def callback(self, session: Session) -> Callback:
        return (CompressedGradients if self.workers == 1 else SimulatedWorkers)(self, session)


class CompressedGradients(Callback):
    """Puts what the workers exchanged in place of the gradient."""

    def __init__(self, method: DeepGradientCompression, session: Session) -> None:
        self.method, self.session = method, session
        settings = session.settings
        self.weight_decay = settings.weight_decay if method.weight_decay is None else method.weight_decay
        self.clip_norm = settings.clip_norm if method.clip_norm is None else method.clip_norm
        self.sent: list[dict[str, Part]] = []
        """What other workers sent in this step."""
        self.momentum: dict[str, Tensor] = {}
        """Ordinary momentum: of dense tensors, of weight decay, of dropped gradients."""
        self.totals = {"steps": 0, "bytes": 0, "entries": 0, "late_steps": 0, "late_bytes": 0, "late_entries": 0}
        self.hooked: nn.Module | None = None
        self.gathered: list[Tensor] = []

    def setup(self, trainer: Trainer) -> None:
        wrong = [name for name in ("momentum", "weight_decay", "clip_norm") if getattr(trainer.settings, name)]
        if trainer.settings.optimizer != "sgd" or wrong:
            name = wrong[0] if wrong else "optimizer"
            raise ConfigurationError(
                f"{self.method.name} does momentum, weight decay and clipping itself with plain SGD steps, but another "
                f"method of this run sets {name}={getattr(trainer.settings, name)}; name {self.method.name} first"
            )
        self.parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        self.shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        self.rank, self.processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
        self.world = self.method.workers * self.processes
        self.workers = [Worker(self.method, self.parameters) for _ in range(self.method.workers)]
        self.momentum = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def epoch_start(self, trainer: Trainer) -> None:
        network = trainer.network
        if isinstance(network, DistributedDataParallel) and self.hooked is not network:
            network.register_comm_hook(Exchange(self, trainer), communication_hook)
            self.hooked = network
        elif self.processes > 1 and self.hooked is None:
            raise ConfigurationError(
                f"{self.method.name} needs DistributedDataParallel, not {type(network).__name__}; "
                "launch without FSDP or DeepSpeed"
            )

    def after_backward(self, trainer: Trainer) -> None:
        if self.hooked is None:
            own = self.compress(trainer, len(self.workers) - 1, gradients_of(self.parameters))
            averaged = mean([*self.sent, own], self.shapes)
            self.sent = []
        else:  # the communication hook has put the mean of all workers there
            averaged = gradients_of(self.parameters)
        self._to_optimizer(averaged)

    def compress(self, trainer: Trainer, worker: int, gradients: Mapping[str, Tensor]) -> dict[str, Part]:
        """What a worker of this process sends in this step; counted."""
        method = self.method
        epoch = trainer.step / max(1, trainer.steps_per_epoch)
        sparsity = sparsity_at(epoch, method.sparsity, method.warmup_epochs)
        clip = None if self.clip_norm is None else local_threshold(self.clip_norm, self.world)
        random = generator(trainer.seed, self.rank + worker, trainer.step)
        parts = self.workers[worker].compress(gradients, sparsity, clip, random)
        entries = sum(len(p.values) if isinstance(p, Message) else p.numel() for p in parts.values())
        for prefix in ("", "late_") if epoch >= method.warmup_epochs else ("",):
            self.totals[prefix + "steps"] += 1
            self.totals[prefix + "bytes"] += bytes_of(parts)
            self.totals[prefix + "entries"] += entries
        return parts

    @torch.no_grad()
    def _to_optimizer(self, averaged: Mapping[str, Tensor]) -> None:
        method = self.method
        for name, parameter in self.parameters.items():
            received = averaged[name].to(parameter.dtype)
            sparse = method.momentum_correction and name in self.workers[0].u
            if sparse and not self.weight_decay:
                parameter.grad = received
                continue
            ordinary = self.weight_decay * parameter if sparse else received + self.weight_decay * parameter
            buffer = self.momentum[name].mul_(method.momentum).add_(ordinary)
            step = ordinary + method.momentum * buffer if method.nesterov else buffer
            parameter.grad = received + step if sparse else step.clone()

    def epoch_end(self, trainer: Trainer) -> None:
        if self.processes > 1 and trainer.checkpoint is not None:
            # The checkpoint is the first process's alone, so it has to hold every worker's memory.
            parts = all_gather_bytes(self.workers[0].to_vector().view(torch.uint8))
            self.gathered = [part.view(torch.float32) for part in parts]

    def finish(self, trainer: Trainer) -> None:
        total = sum(p.numel() for p in self.parameters.values())
        t = self.totals
        late = {
            "compression_ratio_after_warmup": t["late_steps"] * 4 * total / max(1, t["late_bytes"]),
            "entry_ratio_after_warmup": t["late_steps"] * total / max(1, t["late_entries"]),
        }
        self.session.report(
            workers=self.world,
            messages=t["steps"],
            bytes_sent_per_worker=t["bytes"] // len(self.workers),
            bytes_received_per_worker=t["bytes"] // len(self.workers) * (self.world - 1),
            bytes_dense_per_worker=t["steps"] // len(self.workers) * 4 * total,
            compression_ratio=t["steps"] * 4 * total / max(1, t["bytes"]),
            **(late if t["late_steps"] else {}),
        )

    def state_dict(self) -> dict[str, Any]:
        memories = self.gathered or [worker.to_vector() for worker in self.workers]
        return {"memories": memories, "momentum": self.momentum, "totals": dict(self.totals)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["memories"]) != self.world:
            found = len(state["memories"])
            raise ConfigurationError(
                f"the checkpoint is of {found} workers, this run has {self.world}; resume with {found} workers"
            )
        for worker, vector in zip(self.workers, state["memories"][self.rank :]):
            worker.load_vector(vector)
        for name, buffer in self.momentum.items():
            buffer.copy_(state["momentum"][name])
        self.totals = dict(state["totals"])


class SimulatedWorkers(CompressedGradients):
    """N workers in one process: worker k has every N-th sample of each batch from k on, as process k of N would."""

    def training_step(self, trainer: Trainer, batch: Batch) -> Tensor:
        total = torch.zeros((), device=trainer.device)
        for worker in range(self.world):
            part = tree_map(lambda x: x[worker :: self.world] if isinstance(x, Tensor) else x, batch)  # noqa: B023
            loss = trainer.loss(part, trainer.forward(part))
            total += loss.detach()
            if worker == self.world - 1:
                trainer.update(loss)
            else:
                found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
                pairs = zip(self.parameters.items(), found)
                gradients = {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}
                self.sent.append(self.compress(trainer, worker, gradients))
        return total / self.world


class Exchange:
    """The state of the communication hook: the buckets of the step that have come in so far."""

    def __init__(self, callback: CompressedGradients, trainer: Trainer) -> None:
        self.callback, self.trainer = callback, trainer
        self.names = {id(parameter): name for name, parameter in callback.parameters.items()}
        self.waiting: list[tuple[Tensor, Future[Tensor]]] = []
        self.gradients: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Compress the whole gradient, exchange, and hand the mean back in the buckets."""
        # Every process in the same order, whatever the order of its buckets.
        gradients = {name: self.gradients[name] for name in self.callback.shapes if name in self.gradients}
        shapes = {name: self.callback.shapes[name] for name in gradients}
        own = self.callback.compress(self.trainer, 0, gradients)
        dense = {name for name, part in own.items() if isinstance(part, Tensor)}
        others = [unpack(data, shapes, dense) for data in all_gather_bytes(pack(own))]
        for name, average in mean(others, shapes).items():
            self.gradients[name].copy_(average)
        for buffer, future in self.waiting:
            future.set_result(buffer)
        self.waiting, self.gradients = [], {}


def communication_hook(state: Exchange, bucket: GradBucket) -> Future[Tensor]:
    """The ``DistributedDataParallel`` communication hook; all buckets are exchanged together, with the last one."""
    buffer = bucket.buffer()
    future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else [])
    state.waiting.append((buffer, future))
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients()):
        state.gradients[state.names[id(parameter)]] = gradient
    if bucket.is_last():
        state.run()
    return future


# DistributedDataParallel compares the annotations themselves, which postponed ones are not.
communication_hook.__annotations__ = get_type_hints(communication_hook)


def gradients_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The parameters' gradients by name; zero where there is none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}

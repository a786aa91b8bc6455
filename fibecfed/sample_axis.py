"""check_sample_axis: whether the samples lie on the first axis of every LoRA module's input, each on its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .backward import FisherCaptureError, LoraBackward
from .losses import SampleLoss, Task, TaskName, own_losses, task_of
from .sharing import Found, Seen
from .tree import evaluating

FEW = 3  # samples that are looked at


def check_sample_axis(
    model: nn.Module, batch: Mapping[str, Tensor], sample_loss: TaskName | SampleLoss = "classification"
) -> bool:
    """See that the loss of one sample of ``batch``, the largest, reaches that sample's place on the first axis of every
    LoRA module's output, and no other. In eval mode (the mode is put back); ``.grad`` is not touched. Returns False
    where that cannot be seen, since no loss has a gradient (all labels are −100, say).

    :class:`fibecfed.capture_fisher` and :class:`fibecfed.clip_sample_gradients` take what lies on that axis for the
    samples, and can check its length alone: a model that works on (T, N, d) inside, sorts the samples, or mixes them
    would give scores of something else wherever the length is N. :func:`fibecfed.score_samples` and
    :func:`fibecfed.dp_step` call this by themselves.

    Args: model, sample_loss: as for :func:`fibecfed.score_samples`. batch: a dict of tensors with ≥ 2 samples, unequal
    ones at best.

    Raises FisherCaptureError, naming the module; ValueError as :func:`fibecfed.score_samples`.
    """
    task = task_of(sample_loss)
    with evaluating(model), torch.enable_grad(), _OneSample(model) as found:
        losses = own_losses(task.loss if isinstance(task, Task) else task, model, batch)
        found.num_samples = len(losses)
        found.place = int(losses.detach().abs().nan_to_num(-1.0, -1.0).argmax())
        torch.autograd.grad(losses[found.place], found.weights, allow_unused=True)
    return found.told


def few_of(batch: Mapping[str, Tensor], samples: int) -> Mapping[str, Tensor]:
    """The last, the middle and the first of the samples; all of them where they are not told apart by the first axis of
    every tensor. The other way round, so that a model that sorts them by length is found out."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    if samples <= FEW or len(tensors) < len(batch) or any(t.dim() == 0 or t.shape[0] != samples for t in tensors):
        return batch
    places = torch.tensor([samples - 1, samples // 2, 0])
    return {name: value[places.to(value.device)] for name, value in batch.items()}


class _OneSample(LoraBackward):
    """The backward of one sample's loss alone. ``told``: whether any of it was seen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "sum")
        self.place, self.told = 0, False

    @property
    def weights(self) -> list[Tensor]:
        return [weight for pair in self._pairs for weight in pair.trained.values()]

    def _pair_backward(self, seen: Seen) -> tuple[None, None]:
        # what is not finite is some sample's own trouble, and may come from 0 · ∞
        reached = ((seen.grad_y != 0) & seen.grad_y.isfinite()).flatten(1).any(1)
        self.told |= bool(reached[self.place : self.place + 1].any())
        reached[self.place : self.place + 1] = False
        if bool(reached.any()):
            others = ", ".join(map(str, reached.nonzero().flatten().tolist()[:5]))
            raise FisherCaptureError(
                f"{seen.pair.name}: the loss of sample {self.place} reaches place {others} of its first axis, wanted "
                f"{self.place} alone: the samples must lie there, in order, and must not be mixed"
            )
        return None, None

    def _check_counts(self) -> int:
        """A module that this sample does not come to is none that another does not come to."""
        assert self.num_samples is not None
        for module, count in self._counts.items():
            if count != self.num_samples:
                raise FisherCaptureError(
                    f"{module.name}: saw {count} samples where there are {self.num_samples} losses; a module's input "
                    "must have the samples on its first axis"
                )
        return self.num_samples

    def _take(self, seen: Seen, found: Found) -> None:
        raise AssertionError("nothing is computed")

    def _finish(self, scale: float) -> None:
        pass

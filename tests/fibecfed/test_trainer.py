"""The masked optimizers and the capture in loops that are not ours: transformers' Trainer, accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from fibecfed import FlatAdapter, MaskedAdamW, capture_fisher, dp_step, score_samples
from tests.fibecfed.tiny import batch, tiny

SAMPLES, LR, DECAY = 12, 1e-2, 0.1


def data() -> list[dict[str, Tensor]]:
    whole = batch(samples=SAMPLES)
    return [{name: values[n] for name, values in whole.items()} for n in range(SAMPLES)]


def trainer(folder: Path, ours: bool = True, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    """Two epochs of three batches over a model that a trainer has not seen."""
    model = tiny()
    if ours:
        optimizer: torch.optim.Optimizer = MaskedAdamW(FlatAdapter(model), lr=LR, weight_decay=DECAY)
    else:
        optimizer = torch.optim.AdamW(trained(model).values(), lr=LR, weight_decay=DECAY)
    settings = {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True, **options}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=2, max_grad_norm=0.05, use_cpu=True, **settings
    )
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return kind(model, arguments, train_dataset=data(), optimizers=(optimizer, schedule))  # type: ignore[arg-type]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulating"])
def test_it_trains_as_with_torchs_adamw(tmp_path: Path, options: dict[str, int]) -> None:
    ours, theirs = (trainer(tmp_path, whose, **options) for whose in (True, False))
    ours.train()
    theirs.train()
    assert ours.optimizer.state_dict()["state"][0]["step"].unique().tolist() == [4 if options else 6]
    for p, q in zip(trained(ours.model).values(), trained(theirs.model).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_it_resumes_to_the_same_values(tmp_path: Path) -> None:
    whole, resumed = (trainer(tmp_path, save_strategy="epoch") for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for p, q in zip(trained(whole.model).values(), trained(resumed.model).values(), strict=True):
        assert torch.equal(p, q)


class Capturing(Trainer):
    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Tensor:
        with capture_fisher(model) as fisher:
            loss = super().training_step(model, inputs, *rest, **named)
        wanted = score_samples(model, [self._prepare_inputs(inputs)]).scores
        torch.testing.assert_close(fisher.scores, wanted, rtol=1e-4, atol=0)
        self.seen = getattr(self, "seen", 0) + len(wanted)
        return loss


def test_a_capture_around_its_step_scores_its_batches_and_changes_nothing(tmp_path: Path) -> None:
    capturing, plain = trainer(tmp_path, kind=Capturing), trainer(tmp_path)
    capturing.train()
    plain.train()
    assert capturing.seen == 2 * SAMPLES
    for p, q in zip(trained(capturing.model).values(), trained(plain.model).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_accelerate_saves_all_that_is_trained_and_goes_on_from_it(tmp_path: Path) -> None:
    def prepared() -> tuple[Accelerator, nn.Module, Any]:
        accelerator, model = Accelerator(cpu=True), tiny()
        return accelerator, *accelerator.prepare(model, MaskedAdamW(FlatAdapter(model), lr=LR))

    def train(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        for seed in (1, 2):
            optimizer.zero_grad()
            accelerator.backward(model(**batch(seed=seed)).loss)
            optimizer.step()

    accelerator, model, optimizer = prepared()
    train(accelerator, model, optimizer)
    accelerator.save_state(str(tmp_path))
    assert trained(model).keys() <= load_file(tmp_path / "model.safetensors").keys()
    again, other, others = prepared()
    again.load_state(str(tmp_path))
    for each in ((accelerator, model, optimizer), (again, other, others)):
        train(*each)
    for p, q in zip(trained(model).values(), trained(other).values(), strict=True):
        assert torch.equal(p, q)


def test_safetensors_saves_a_model_whole(tmp_path: Path) -> None:
    model = tiny()
    FlatAdapter(model)
    save_model(model, str(tmp_path / "model.safetensors"))
    found = load_file(tmp_path / "model.safetensors")
    for name, p in trained(model).items():
        assert torch.equal(found[name], p)


def test_a_private_step_that_accelerate_would_leave_out_is_refused() -> None:
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=2), tiny()
    model, optimizer = accelerator.prepare(model, MaskedAdamW(FlatAdapter(model)))
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    options = {"max_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 5}
    with (
        pytest.raises(ValueError, match=r"optimizer: accelerate would leave out this step \(accumulate\)"),
        accelerator.accumulate(model),
    ):
        dp_step(model, batch(), optimizer, **options)  # type: ignore[arg-type]
    assert all(torch.equal(p, before[name]) for name, p in trained(model).items())

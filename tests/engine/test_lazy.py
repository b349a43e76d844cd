"""LazyConfig's trainer, with a model of two numbers that takes a step in no time."""

import itertools

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.engine import SimpleTrainer, hooks
from detectron2.evaluation import DatasetEvaluator
from fvcore.common.param_scheduler import LinearParamScheduler
from helpers import read_metrics
from omegaconf import OmegaConf
from torch import nn

from pisa_d2.engine import LazyTrainer, build_lazy_train_loader, clip_gradients, lazy
from pisa_d2.engine.metrics import MetricsWriter
from pisa_d2.engine.trainer import SaveOnSignal

DICTS = [{"id": i, "width": 10 + i % 3, "height": 11} for i in range(20)]


def loader(**settings):
    settings = {"dataset": DICTS, "mapper": dict, "total_batch_size": 4, **settings}
    return build_lazy_train_loader(**settings)


def ids(loader, num=9):
    found = [[d["id"] for d in batch] for batch in itertools.islice(loader, num)]
    loader.close()
    return found


def last_first(dicts):
    return reversed(range(len(dicts)))


def test_a_batch_has_the_share_of_a_process_in_the_total(monkeypatch):
    assert ids(loader(), 3) != ids(loader(make_sampler=last_first), 3)
    assert ids(loader(make_sampler=last_first), 1) == [[19, 18, 16, 15]]  # all of them high
    monkeypatch.setattr(lazy.comm, "get_world_size", lambda: 2)
    assert ids(loader(make_sampler=last_first), 1) == [[19, 18]]


def test_images_come_in_an_endless_random_order_unless_a_sampler_is_given():
    order = [i for batch in ids(loader(aspect_ratio_grouping=False), 10) for i in batch]
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20))
    assert order[:20] != order[20:]
    given = loader(make_sampler=last_first, aspect_ratio_grouping=False)
    assert ids(given) == [list(range(i, i - 4, -1)) for i in (19, 15, 11, 7, 3)]


def test_damaged_images_are_left_out_with_a_warning(caplog):
    def read(record):
        if record["id"] % 2:
            raise OSError("image file is truncated")
        return record

    assert all(i % 2 == 0 for batch in ids(loader(mapper=read)) for i in batch)
    assert "damaged (image file is truncated)" in caplog.text


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch):
    monkeypatch.setattr(lazy.comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="total_batch_size = 16 is not allowed.*processes, 3"):
        build_lazy_train_loader(dataset=[], mapper=dict, total_batch_size=16)


@pytest.mark.parametrize(("max_norm", "step"), [(1, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_the_gradient_of_each_parameter_is_clipped_before_a_step(max_norm, step):
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = clip_gradients(
        optimizer=torch.optim.SGD, max_norm=max_norm, params=parameters, lr=0.5
    )
    assert isinstance(optimizer, torch.optim.SGD)
    for parameter in parameters:
        parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    for parameter in parameters:
        torch.testing.assert_close(parameter.detach(), -0.5 * torch.tensor(step))


class Points(nn.Module):
    """Two numbers, whose loss depends on the batch and on a random draw."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(2))

    def forward(self, batch):
        if not self.training:
            return [{"value": self.values.sum().item()} for _ in batch]
        wanted = torch.tensor([[d["id"], d["width"]] for d in batch]) + torch.randn(1)
        return {"loss": (self.values - wanted).square().mean()}


class Mean(DatasetEvaluator):
    def reset(self):
        self.values = []

    def process(self, inputs, outputs):
        self.values += [output["value"] for output in outputs]

    def evaluate(self):
        return {"points": {"mean": sum(self.values) / len(self.values)}}


def parameters_of(model):
    return model.parameters()


def batches_of_one():
    return [[record] for record in DICTS[:3]]


def config(folder, **train):
    return OmegaConf.create(
        {
            "train": {
                **{"output_dir": str(folder), "init_checkpoint": "", "seed": 3, "max_iter": 6},
                **{"device": "cpu", "amp": {"enabled": False}, "eval_period": 0},
                **{"checkpointer": {"period": 2, "max_to_keep": 9}, "log_period": 1, **train},
            },
            "model": L(Points)(),
            "optimizer": L(torch.optim.SGD)(params=L(parameters_of)(), lr=0.1, momentum=0.9),
            "lr_multiplier": L(LinearParamScheduler)(start_value=1.0, end_value=0.1),
            "dataloader": {
                "train": L(loader)(),
                "test": L(batches_of_one)(),
                "evaluator": L(Mean)(),
            },
        },
        flags={"allow_objects": True},
    )


def train(folder, *, resume=False, before_step=None, change=lambda cfg: None, **settings):
    folder.mkdir(exist_ok=True)
    cfg = config(folder, **settings)
    change(cfg)
    trainer = LazyTrainer(cfg)
    trainer.resume_or_load(resume)
    if before_step:
        trainer.register_hooks([hooks.CallbackHook(before_step=before_step)])
    trainer.train()
    return trainer


def final(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


@pytest.mark.parametrize("seed", [3, -1])
def test_a_resumed_run_ends_as_the_one_that_went_on(tmp_path, seed):
    train(tmp_path, seed=seed)
    expected = final(tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    trainer = train(tmp_path, seed=seed, resume=True)
    assert (trainer.start_iter, trainer.max_iter) == (2, 6)
    torch.testing.assert_close(final(tmp_path), expected, rtol=0, atol=0)
    assert expected["trainer"]["iteration"] == 5
    again = train(tmp_path / "again", seed=seed).model.state_dict()
    assert torch.equal(again["values"], expected["model"]["values"]) == (seed == 3)


def test_a_run_begins_with_the_initial_checkpoint_unless_it_resumes(tmp_path):
    values = torch.tensor([5.0, 7.0])
    path = tmp_path / "initial.pth"
    torch.save({"model": {"values": values}}, path)
    for resume in (False, True):  # there is nothing to resume
        (tmp_path / "run").mkdir(exist_ok=True)
        trainer = LazyTrainer(config(tmp_path / "run", init_checkpoint=str(path)))
        trainer.resume_or_load(resume)
        assert torch.equal(trainer.model.values.detach(), values) and trainer.start_iter == 0
    train(tmp_path / "run", max_iter=2)
    trainer = LazyTrainer(config(tmp_path / "run", init_checkpoint=str(path)))
    trainer.resume_or_load(resume=False)
    assert torch.equal(trainer.model.values.detach(), values) and trainer.start_iter == 0


def test_the_learning_rate_follows_the_schedule(tmp_path):
    trainer = train(tmp_path, max_iter=4)
    rates = [line["lr"] for line in read_metrics(tmp_path) if "lr" in line]
    assert rates == pytest.approx([0.1, 0.0775, 0.055, 0.0325])
    assert type(trainer._trainer) is SimpleTrainer


def test_checkpoints_evaluations_and_metrics_have_their_periods(tmp_path):
    train(tmp_path, eval_period=3)
    names = {path.name for path in tmp_path.glob("*.pth")}
    assert names == {f"model_{i:07}.pth" for i in (1, 3, 5)} | {"model_final.pth"}
    metrics = read_metrics(tmp_path)
    assert [line["iteration"] for line in metrics] == list(range(7))
    assert [i for i, line in enumerate(metrics) if "points/mean" in line] == [2, 6]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_a_signal_saves_before_the_evaluation(tmp_path):
    built = LazyTrainer(config(tmp_path))._hooks
    kinds = [hooks.PeriodicCheckpointer, SaveOnSignal, hooks.EvalHook, hooks.PeriodicWriter]
    assert [type(hook) for hook in built][-4:] == kinds
    assert any(isinstance(writer, MetricsWriter) for writer in built[-1]._writers)


def test_processes_other_than_the_main_one_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy.comm, "is_main_process", lambda: False)
    built = LazyTrainer(config(tmp_path)).build_hooks()
    assert not any(
        isinstance(hook, (hooks.PeriodicCheckpointer, hooks.PeriodicWriter)) for hook in built
    )
    assert any(isinstance(hook, hooks.EvalHook) for hook in built)


def test_a_loader_that_cannot_resume_is_warned_of(tmp_path, caplog):
    def other_loader(cfg):
        cfg.dataloader.train = L(itertools.repeat)(object=DICTS[:4])

    train(tmp_path, max_iter=2, change=other_loader)
    assert "restarts" not in caplog.text
    train(tmp_path, max_iter=4, change=other_loader, resume=True)
    assert "the sequence of images restarts" in caplog.text


def test_an_evaluation_without_an_evaluator_has_no_results(tmp_path):
    cfg, model = config(tmp_path), Points()
    model.values.data += 2
    assert lazy.evaluate(cfg, model) == {"points": {"mean": 4.0}}
    del cfg.dataloader.evaluator
    assert lazy.evaluate(cfg, model) == {}

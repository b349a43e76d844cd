import os
import signal

import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.engine import hooks
from helpers import REGIONS_ON
from jobs import digits_cfg, mark_crowds

from pisa_d2.data import make_digits, register_digits
from pisa_d2.engine import EXIT_SAVED, ResumableTrainer

NO_EVALUATION = ["DATASETS.TEST", "()"]


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    make_digits(root, num_train=12, num_val=1)
    mark_crowds(root)
    register_digits(root)


def train(folder, *options, resume=False, before_step=None, cls=ResumableTrainer):
    trainer = cls(digits_cfg(*NO_EVALUATION, *options, "OUTPUT_DIR", str(folder)))
    trainer.resume_or_load(resume)
    if before_step:
        trainer.register_hooks([hooks.CallbackHook(before_step=before_step)])
    trainer.train()
    return trainer


def load(folder, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)


@pytest.mark.parametrize(("seed", "regions"), [("3", REGIONS_ON), ("-1", [])])
@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_a_resumed_run_ends_as_the_one_that_went_on(tmp_path, seed, regions, num_workers):
    options = ["SEED", seed, "DATALOADER.NUM_WORKERS", num_workers, "SOLVER.MAX_ITER", "5"]
    options += regions
    train(tmp_path, *options)
    expected = load(tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    trainer = train(tmp_path, *options, resume=True)
    assert trainer.start_iter == 2
    torch.testing.assert_close(load(tmp_path), expected, rtol=0, atol=0)


def test_a_checkpoint_holds_optimizer_schedule_and_seed_and_is_safe_to_load(tmp_path):
    trainer = train(tmp_path, "SOLVER.MAX_ITER", "2")
    state = load(tmp_path)["trainer"]
    assert state["iteration"] == 1 and state["seed"] == 1
    assert state["hooks"]["LRScheduler"]["last_epoch"] == 2
    momenta = state["_trainer"]["optimizer"]["state"]
    assert len(momenta) == sum(p.requires_grad for p in trainer.model.parameters())
    assert all(m["momentum_buffer"].abs().max() > 0 for m in list(momenta.values())[:1])


def test_a_resumed_run_keeps_its_learning_rate_and_follows_the_new_schedule(tmp_path):
    """Check the facts in check_run's warning."""
    options = ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.WARMUP_ITERS", "0"]
    options += ["SOLVER.BASE_LR", "0.01", "SOLVER.STEPS", "(9,)"]
    train(tmp_path, *options, "SOLVER.MAX_ITER", "2")
    options += ["SOLVER.BASE_LR", "0.5", "SOLVER.MOMENTUM", "0.5", "SOLVER.WEIGHT_DECAY", "0.5"]
    options += ["SOLVER.MAX_ITER", "5", "SOLVER.STEPS", "(4,)"]
    groups = []
    train(
        tmp_path,
        *options,
        resume=True,
        before_step=lambda trainer: groups.append(dict(trainer.optimizer.param_groups[0])),
    )
    assert [group["lr"] for group in groups] == pytest.approx([0.01, 0.01, 0.001])
    assert {(group["momentum"], group["weight_decay"]) for group in groups} == {(0.9, 1e-4)}


def test_a_training_with_amp_resumes_one_without(tmp_path):
    trainer = train(tmp_path, "SOLVER.MAX_ITER", "1")
    state = trainer.state_dict()

    class Scaled:
        scale = 4.0

        def state_dict(self):
            return {"grad_scaler": self.scale}

        def load_state_dict(self, state):
            self.loaded = state

    trainer._trainer = Scaled()
    trainer.load_state_dict(state)
    assert trainer._trainer.loaded == {**state["_trainer"], "grad_scaler": 4.0}


def test_a_checkpoint_of_detectron2_0_6_is_resumed_without_its_optimizer(tmp_path, caplog):
    train(tmp_path, "SOLVER.MAX_ITER", "2")
    state = load(tmp_path)
    del state["trainer"]["_trainer"], state["trainer"]["seed"]
    torch.save(state, tmp_path / "model_final.pth")
    trainer = train(tmp_path, "SOLVER.MAX_ITER", "3", resume=True)
    assert trainer.start_iter == 2 and trainer.iter == 3
    assert "has no optimizer state" in caplog.text


@pytest.mark.parametrize(
    ("signum", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")]
)
def test_a_signal_saves_after_the_step_and_exits_with_its_own_status(
    tmp_path, signum, name, caplog
):
    before = signal.getsignal(signum)

    def strike(trainer):
        if trainer.iter == 2:
            os.kill(os.getpid(), signum)

    with pytest.raises(SystemExit) as exit_:
        train(tmp_path, before_step=strike)
    assert exit_.value.code == EXIT_SAVED == 75
    assert f"{name}: saved model_0000002.pth after iteration 2. Rerun with --resume" in caplog.text
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert load(tmp_path, "model_0000002.pth")["iteration"] == 2
    assert signal.getsignal(signum) is before


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    """As a shell ignores Ctrl-C for processes in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(
            tmp_path,
            "SOLVER.MAX_ITER",
            "2",
            before_step=lambda trainer: os.kill(os.getpid(), signal.SIGINT),
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "model_final.pth").exists()


def test_a_run_that_fails_in_its_last_step_is_not_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(ResumableTrainer, "test", lambda *args: pytest.fail("evaluated"))
    options = ["SOLVER.MAX_ITER", "2", "DATASETS.TEST", "('digits_val',)"]
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, *options, before_step=lambda trainer: 1 // (1 - trainer.iter))


def test_with_another_loader_a_resumed_run_is_told_that_its_sequence_restarts(tmp_path, caplog):
    class Trainer(ResumableTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg)

    train(tmp_path, "SOLVER.MAX_ITER", "1", cls=Trainer)
    assert "restarts" not in caplog.text
    trainer = train(tmp_path, "SOLVER.MAX_ITER", "2", resume=True, cls=Trainer)
    assert trainer.start_iter == 1 and "restarts" in caplog.text

import os
import signal

import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.engine import hooks
from jobs import digits_cfg

from pisa_d2.data import make_digits, register_digits
from pisa_d2.engine import EXIT_SAVED, ResumableTrainer

NO_EVALUATION = ["DATASETS.TEST", "()"]


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    make_digits(root, num_train=12, num_val=1)
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


@pytest.mark.parametrize("seed", ["3", "-1"])
@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_a_resumed_run_ends_as_the_one_that_went_on(tmp_path, seed, num_workers):
    options = ["SEED", seed, "DATALOADER.NUM_WORKERS", num_workers, "SOLVER.MAX_ITER", "5"]
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


def test_a_checkpoint_of_detectron2_0_6_is_resumed_without_its_optimizer(tmp_path, caplog):
    train(tmp_path, "SOLVER.MAX_ITER", "2")
    state = load(tmp_path)
    del state["trainer"]["_trainer"], state["trainer"]["seed"]
    torch.save(state, tmp_path / "model_final.pth")
    trainer = train(tmp_path, "SOLVER.MAX_ITER", "3", resume=True)
    assert trainer.start_iter == 2 and trainer.iter == 3
    assert "has no optimizer state" in caplog.text


def test_sigterm_saves_after_the_step_and_exits_with_its_own_status(tmp_path, caplog):
    before = signal.getsignal(signal.SIGTERM)

    def strike(trainer):
        if trainer.iter == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as exit_:
        train(tmp_path, before_step=strike)
    assert exit_.value.code == EXIT_SAVED == 75
    assert "Stopped by SIGTERM after iteration 2, which model_0000002.pth holds" in caplog.text
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert load(tmp_path, "model_0000002.pth")["iteration"] == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_fails_in_its_last_step_is_not_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(ResumableTrainer, "test", lambda *args: pytest.fail("evaluated"))
    options = ["SOLVER.MAX_ITER", "2", "DATASETS.TEST", "('digits_val',)"]
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, *options, before_step=lambda trainer: 1 // (1 - trainer.iter))


def test_with_another_loader_a_resumed_run_is_told_that_its_sequence_begins_anew(tmp_path, caplog):
    class Trainer(ResumableTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg)

    train(tmp_path, "SOLVER.MAX_ITER", "1", cls=Trainer)
    assert "begins anew" not in caplog.text
    trainer = train(tmp_path, "SOLVER.MAX_ITER", "2", resume=True, cls=Trainer)
    assert trainer.start_iter == 1 and "begins anew" in caplog.text

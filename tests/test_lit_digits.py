"""The example of LiT on digits: losses and metrics compared with other formulas, and a run of few steps."""

import json
from unittest import mock

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence


@pytest.fixture
def digits(example):
    return example("digits")


@pytest.fixture
def lit_digits(example):
    return example("lit_digits")


def noisy_at(digits, timestep, count=2):
    images = torch.randint(0, 17, (count, 1, 8, 8)) * digits.GRAY_STEP - 1
    timesteps = torch.full((count,), timestep)
    given = digits.Digits(images, torch.arange(count))
    return digits.add_noise(given, timesteps, digits.scheduler(), torch.Generator().manual_seed(1))


def moments(schedule, output, noisy):
    """Return mean and standard deviation of a step of diffusers' scheduler, in float64."""
    found = []
    for noise in (0.0, 1.0):
        drawn = torch.full_like(noisy.images, noise)
        with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", return_value=drawn):
            found.append(schedule.step(output, int(noisy.timesteps[0]), noisy.images).prev_sample.double())
    return found[0], found[1] - found[0]


@pytest.mark.parametrize("timestep", [1, 2, 400, 999])
def test_the_bound_is_the_divergence_of_the_schedulers_steps(digits, timestep):
    schedule, noisy = DDPMScheduler(variance_type="learned_range", clip_sample=False), noisy_at(digits, timestep)
    prediction = digits.Prediction(noisy.noise + 0.3 * torch.randn(2, 1, 8, 8), 0.3 * torch.randn(2, 1, 8, 8))
    # With the true noise and the smallest variance, it is the step to the clean image.
    true = Normal(*moments(schedule, torch.cat([noisy.noise, -torch.ones(2, 1, 8, 8)], dim=1), noisy))
    own = Normal(*moments(schedule, torch.cat(prediction, dim=1), noisy))
    expected = kl_divergence(true, own).mean() / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(digits.bound(prediction, noisy, schedule).double(), expected, rtol=1e-3, atol=0)


def test_the_probabilities_of_all_grays_sum_to_one(digits):
    noisy, share = noisy_at(digits, 0, count=1), 0.0
    prediction = digits.Prediction(noisy.noise + 2 * torch.randn(1, 1, 8, 8), torch.rand(1, 1, 8, 8))
    for gray in range(17):
        clean = torch.full((1, 1, 8, 8), gray * digits.GRAY_STEP - 1)
        each = [
            digits.bound(
                digits.Prediction(*(x[..., row : row + 1, :1] for x in prediction)),
                noisy._replace(images=noisy.images[..., row : row + 1, :1], clean=clean[..., :1, :1]),
                digits.scheduler(),
            )
            for row in range(8)
        ]
        share += 2 ** -torch.stack(each)
    torch.testing.assert_close(share, torch.ones(8), atol=1e-4, rtol=0)


def test_the_bound_trains_only_the_variance(digits):
    noisy = noisy_at(digits, 300)
    prediction = digits.Prediction(*(torch.randn(2, 1, 8, 8, requires_grad=True) for _ in range(2)))
    digits.bound(prediction, noisy, digits.scheduler()).backward()
    assert prediction.noise.grad is None
    assert prediction.variance.grad.abs().min() > 0


def test_what_students_inherit(lit_digits, digits):
    teacher = digits.new_model(0)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    for inherits, shares_attention, shares_others in (
        ("all", True, True),
        ("all but attention", False, True),
        ("nothing", False, False),
    ):
        student = lit_digits.make_student(teacher, lit_digits.Student(inherits=inherits)).state_dict()
        for part, shared in (("attn1.to_q.weight", shares_attention), ("ff.net.2.weight", shares_others)):
            name = f"transformer_blocks.1.{part}"
            assert torch.equal(student[name], before[name]) is shared
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_student_learns_from_the_teachers_noise_and_variance(lit_digits, digits):
    teacher, noisy = digits.new_model(0), noisy_at(digits, 300)
    torch.nn.init.normal_(teacher.proj_out_2.weight, std=0.1)
    prediction = digits.Prediction(torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8))
    wanted = digits.predict(teacher, noisy)
    loss = lit_digits.student_loss(lit_digits.Student(noise=0.5, variance=3.0), teacher)(prediction, noisy)
    expected = lit_digits.teacher_loss(prediction, noisy)
    expected += 0.5 * (prediction.noise - wanted.noise).square().mean()
    expected += 3.0 * (prediction.variance - wanted.variance).square().mean()
    torch.testing.assert_close(loss, expected)


def test_drawing_and_the_classifier(digits):
    training, held_out = digits.load()
    assert (len(training.labels), len(held_out.labels)) == (1437, 360)
    assert (training.images.min(), training.images.max()) == (-1, 1)
    judge = digits.train_judge(training, epochs=2)
    assert judge.accuracy(held_out) > 0.8
    shuffled = held_out._replace(labels=held_out.labels.roll(1))
    assert judge.accuracy(shuffled) < 0.3
    wrong = held_out._replace(images=-held_out.images)
    assert judge.distance(held_out, held_out) == pytest.approx(0, abs=1e-3)
    assert judge.distance(held_out, training) < 0.1 * judge.distance(held_out, wrong)
    model = digits.new_model(0)
    one, other = digits.draw(model, 20, 3, seed=1), digits.draw(model, 20, 3, seed=1)
    assert torch.equal(one.images, other.images)
    assert one.labels.tolist() == 2 * list(range(10))


def test_bits_sum_over_the_timesteps(digits):
    model, (_, held_out) = digits.new_model(0), digits.load()
    torch.nn.init.normal_(model.proj_out_2.weight, std=0.1)
    one = digits.Digits(held_out.images[:1], held_out.labels[:1])
    rng, total = torch.Generator().manual_seed(5), 0.0
    for timesteps in torch.arange(1000).split(100):
        torch.randint(1, (100,), generator=rng)
        given = digits.Digits(one.images.expand(100, -1, -1, -1), one.labels.expand(100))
        noisy = digits.add_noise(given, timesteps, digits.scheduler(), rng)
        with torch.no_grad():
            total += 100 * digits.bound(digits.predict(model, noisy), noisy, digits.scheduler()).item()
    assert digits.bits(model, one, 1, seed=5) == pytest.approx(total, rel=1e-5)


def test_a_run_is_saved_and_continued(lit_digits, digits, tmp_path, monkeypatch):
    names = [lit_digits.LIT, "nothing inherited"]
    monkeypatch.setattr(lit_digits, "STUDENTS", {name: lit_digits.STUDENTS[name] for name in names})
    monkeypatch.setattr(digits, "BATCH", 4)
    monkeypatch.setattr(digits, "bits", lambda *_: 1.0)
    output, folder, sheet = tmp_path / "found.json", tmp_path / "kept", tmp_path / "sheet.png"
    few = {"steps": 12, "count": 10, "drawing_steps": 2, "digits_a_timestep": 1, "epochs": 1}
    lit_digits.main(output, folder, **few, only=["teacher"])
    first = json.loads(output.read_text())
    assert [(row["model"], row.get("steps")) for row in first["rows"][2:]] == [
        ("teacher", step) for step in (1, 2, 4, 12, 16)
    ]
    lit_digits.main(output, folder, sheet, **few)
    found = json.loads(output.read_text())
    assert found["rows"][:7] == first["rows"]
    assert [(row["model"], row["steps"]) for row in found["rows"][7:]] == [
        ("LiT", 1),
        ("LiT", 2),
        ("LiT", 4),
        ("nothing inherited", 1),
        ("nothing inherited", 2),
    ]
    assert sheet.exists()
    # A missing run is repeated, with the same result.
    (folder / "LiT.json").unlink()
    lit_digits.main(output, folder, **few)
    assert json.loads(output.read_text()) == found
    with pytest.raises(ValueError, match="holds runs of other settings"):
        lit_digits.main(output, folder, **{**few, "count": 20})

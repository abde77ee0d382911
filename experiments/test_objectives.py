"""Tests of the objectives beyond the paper."""

import pytest
import torch
from torch.nn import functional as F

import paraclip
from common.cli import UserError
from data import BadSample, Sample
from experiments.dose import Dose, at_dose
from experiments.geometry import Geometry, GeometryConfig, caption_centroids, geometry_loss
from experiments.second_caption import SecondCaption
from paraclip import Config, Contrastive, load_model
from test_paraclip import (SENTENCES, TINY, build, check_gradients_on_ranks, flags, lm,
                           private_cache, write_list_shards, write_shards)

CASES = [dict(objective=Geometry, config=GeometryConfig, weight=0.7, accum=2),
         dict(objective=SecondCaption, accum=2)]


def test_gradients_on_many_processes_equal_one(lm, tmp_path):
    check_gradients_on_ranks(2, lm, tmp_path, CASES)


@pytest.mark.parametrize("text_term", [True, False])
def test_geometry_loss_against_a_loop(text_term):
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(2, 5, 3), dim=-1)
    lm_features = F.normalize(torch.randn(5, 4), dim=-1)

    def neighbours(queries, keys, i):
        scores = [queries[i] @ keys[j] / 0.1 for j in range(5) if j != i]
        return torch.stack(scores).softmax(0)

    expected = 0.0
    for i in range(5):
        target = neighbours(lm_features, lm_features, i)
        terms = [(0.5, image, text), (0.5, text, image), (1, text, text)]
        for weight, queries, keys in terms if text_term else terms[:2]:
            log_ratio = (target / neighbours(queries, keys, i)).log()
            expected += weight * (target * log_ratio).sum().item() / 5
    found = geometry_loss(image, text, lm_features, text_term).item()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("text_term", [True, False])
def test_flags_of_geometry_reach_its_loss(lm, text_term):
    model = build(lm)
    cfg = GeometryConfig(weight=0.7, text_term=text_term)
    objective = Geometry(cfg, model, SENTENCES, model.tokenize)
    image, text = F.normalize(torch.randn(2, 5, 16), dim=-1)
    target = objective.centroids[:5]
    loss, _ = objective.loss(image, text, torch.tensor(3.0), target)
    clip_loss, _ = Contrastive.loss(objective, image, text, torch.tensor(3.0), None)
    term = 0.7 * geometry_loss(image, text, target, text_term)
    assert (loss - clip_loss).item() == pytest.approx(term.item(), rel=1e-4)


def test_caption_centroids_against_a_loop(lm):
    model = build(lm)
    centroids = caption_centroids(model, SENTENCES, model.tokenize)
    for number in (0, 5, 63):
        mean = torch.zeros(32)
        for caption in SENTENCES[number]:
            tokens = model.tokenize([caption])
            mean += F.normalize(model.text_tower.lm_states(tokens)[0].mean(0), dim=-1).detach()
        assert torch.allclose(centroids[number], mean / mean.norm(), atol=1e-5)


def test_a_sample_that_cannot_be_read_gets_no_wrong_target(lm):
    class Index(list):
        def captions(self, number):
            raise BadSample("unreadable shard")

    model = build(lm)
    with pytest.raises(UserError, match="sample 0 gets no target: unreadable shard"):
        caption_centroids(model, Index([0]), model.tokenize)


def test_loss_of_two_captions_matches_plain_sums():
    torch.manual_seed(0)
    image, first, second = F.normalize(torch.randn(3, 5, 8), dim=-1)

    def clip_loss(a, b):
        logits = 3.0 * a @ b.T
        right = logits.diagonal()
        return (2 * -right + logits.logsumexp(0) + logits.logsumexp(1)).mean() / 2

    expected = (clip_loss(image, first) + clip_loss(image, second) + clip_loss(first, second)) / 3
    side_by_side = torch.stack([first, second], dim=1).flatten(0, 1)
    objective = SecondCaption(Config(), None, None, None)
    loss, _ = objective.loss(image, side_by_side, torch.tensor(3.0), None)
    assert loss.item() == pytest.approx(expected.item())


def test_second_captions_are_of_the_same_images():
    objective = SecondCaption(Config(), None, None, None)
    samples = [Sample(None, f"{i} b", [f"{i} {letter}" for letter in "abc"], 0, i, "")
               for i in range(6)]
    captions = objective.captions(samples)
    for i in range(6):
        assert captions[2 * i] == f"{i} b" and captions[2 * i + 1] in (f"{i} a", f"{i} c")
    # The draw does not depend on the neighbours in the batch.
    assert objective.captions(samples[3:]) == captions[6:]
    with pytest.raises(UserError, match="the only caption"):
        objective.captions([Sample(None, "a", ["a"], 0, 0, "")])


@pytest.mark.parametrize("objective, config, complaint", [
    (Geometry, GeometryConfig, "no config.json of this program"),
    (SecondCaption, Config, "other settings.*objective")])
def test_an_objective_trains_and_loads(lm, tmp_path, objective, config, complaint):
    folder = write_list_shards(tmp_path / "s", 40)
    fields = TINY | dict(data=folder, lm=lm, out=str(tmp_path / "run"))
    paraclip.train(config(**fields), objective)
    assert load_model(tmp_path / "run").encode_text(["a dog"]).shape == (1, 16)
    # Without the objective, the same command does not continue the run.
    with pytest.raises(UserError, match=complaint):
        paraclip.train(Config(**fields))


def test_geometry_needs_a_frozen_language_model():
    with pytest.raises(UserError, match="--text scratch"):
        GeometryConfig(text="scratch")


def test_a_dose_leads_from_frozen_to_aligned_states(lm, tmp_path, monkeypatch):
    paraclip.main(flags(data=write_shards(tmp_path / "s", [20]), out=tmp_path / "run",
                        **TINY | dict(lm=lm, text="align", steps=3, warmup=0)),
                  make_objective=Dose)
    monkeypatch.setenv("DOSE_RUN", str(tmp_path / "run"))
    captions, features = ["a dog", "a red cat on a mat"], []
    for dose in ("0", "0.5", "1"):
        monkeypatch.setenv("DOSE", dose)
        features.append(at_dose().encode_text(captions))
    aligned = load_model(tmp_path / "run")
    assert torch.equal(features[2], aligned.encode_text(captions))
    assert not torch.allclose(features[1], features[2], atol=1e-4)
    aligned.text_tower.align = torch.nn.ModuleList()
    assert torch.allclose(features[0], aligned.encode_text(captions), atol=1e-6)

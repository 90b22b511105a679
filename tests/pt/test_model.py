"""What is particular to PyTorch."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from roberta_pln import schema
from roberta_pln.pt import RobertaPreLayerNormForMaskedLM, RobertaPreLayerNormModel, attention
from roberta_pln.pt.attention import MultiHeadAttention
from tests.contract import INPUTS, random_ids, tiny_config

IDS = torch.from_numpy(random_ids())
PADDED = {name: torch.from_numpy(value) for name, value in INPUTS["right padding"].items()}


def masked_lm(**changes):
    torch.manual_seed(0)
    return RobertaPreLayerNormForMaskedLM(tiny_config(**changes))


def test_state_dict_has_the_names_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.RobertaPreLayerNormForMaskedLM(transformers.RobertaPreLayerNormConfig(**_plain()))
    masked_lm().load_state_dict(theirs.state_dict())
    assert set(masked_lm().state_dict()) == set(theirs.state_dict())


def _plain():
    return {k: v for k, v in tiny_config().to_dict().items() if k not in ("model_type", "dtype")}


def test_the_decoder_shares_the_word_table():
    model = masked_lm()
    word_table = model.roberta_prelayernorm.embeddings.word_embeddings.weight
    assert model.lm_head.decoder.weight is word_table
    assert model.lm_head.decoder.bias is model.lm_head.bias
    assert copy.deepcopy(model).lm_head.decoder.weight is not word_table
    untied = masked_lm(tie_word_embeddings=False)
    assert untied.lm_head.decoder.weight is not untied.roberta_prelayernorm.embeddings.word_embeddings.weight
    assert untied.num_parameters() == model.num_parameters() + 99 * 32


def test_the_fused_kernel_computes_the_same(monkeypatch):
    """Without gradients attention is one fused call; with them it is written out. Both in float64."""
    model = masked_lm().double().eval()
    for inputs in ("no mask", "a fully padded row", "left padding", "a mask of three axes"):
        tensors = {name: torch.as_tensor(value) for name, value in INPUTS[inputs].items()}
        with torch.no_grad():
            fused = model(**tensors).logits
            with monkeypatch.context() as patch:
                patch.setattr(MultiHeadAttention, "is_plain", lambda *_: False)
                written_out = model(**tensors).logits
        assert torch.equal(written_out, model(**tensors).logits)
        torch.testing.assert_close(fused, written_out, rtol=0, atol=1e-13)  # a few hundred roundings of 1e-16


@pytest.mark.parametrize("inner", [False, True], ids=["layers are kept", "layers are computed anew"])
@pytest.mark.parametrize("texts", [1, 2, 3, 8])
def test_texts_that_take_turns(texts, inner, monkeypatch):
    """The same step as of all texts at once, whose attention is written out, in float64."""
    model = masked_lm(initializer_range=0.2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0).double()
    if inner:
        model.gradient_checkpointing_enable()
    for inputs in ("no mask", "a fully padded row", "a mask of four axes", "a mask of three axes"):
        _, length = INPUTS[inputs]["input_ids"].shape
        with monkeypatch.context() as patch:
            patch.setattr(attention, "SCORES_AT_A_TIME", texts * model.config.num_attention_heads * length**2)
            ours, _ = training_step(model, INPUTS[inputs])
            patch.setattr(MultiHeadAttention, "takes_turns", lambda *_: False)
            expected, _ = training_step(model, INPUTS[inputs])
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)  # some hundred roundings of 1e-16


def test_derivatives_in_every_mode():
    """Forward mode, and many directions at once, as of the plain backward pass."""
    model = RobertaPreLayerNormModel(tiny_config(initializer_range=0.2), add_pooling_layer=False).double().eval()
    embeds = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)

    def run(embeds):
        return model(inputs_embeds=embeds).last_hidden_state[:, :2, :3].sin().sum(0).flatten()

    rows = torch.stack([torch.autograd.grad(value, embeds, retain_graph=True)[0] for value in run(embeds)])
    y = run(embeds)
    (batched,) = torch.autograd.grad(y, embeds, torch.eye(len(y), dtype=y.dtype), is_grads_batched=True)
    torch.testing.assert_close(batched, rows, rtol=0, atol=1e-13)  # some hundred roundings of 1e-16
    direction = torch.randn_like(embeds)
    with torch.autograd.forward_ad.dual_level():
        slope = torch.autograd.forward_ad.unpack_dual(
            run(torch.autograd.forward_ad.make_dual(embeds, direction))
        ).tangent
    torch.testing.assert_close(slope, (rows * direction).sum((1, 2, 3)), rtol=0, atol=1e-13)


def test_training_keeps_no_more_than_it_must():
    """Nothing of attention that grows with the square of the length, and no input of a dense layer but one."""
    config = tiny_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, num_hidden_layers=1)
    torch.manual_seed(0)
    model = RobertaPreLayerNormModel(config, add_pooling_layer=False).train()
    ids = random_ids(2, 13)
    _, kept = training_step(model, {"input_ids": ids})
    scores, states, inner = (ids.size * size for size in (4 * 13, config.hidden_size, config.intermediate_size))
    assert scores not in kept
    assert kept.count(inner) == 1  # before the activation
    # What goes into four norms; queries, keys and values; what is read of them; bytes of three dropouts; and the
    # result, which the step keeps for itself.
    assert kept.count(states) == 4 + 3 + 1 + 3 + 1
    _, kept_before = training_step(model, {"input_ids": ids}, output_attentions=True)
    assert scores in kept_before


def training_step(model, inputs, **switches):
    """Value and gradients of a step, and for each tensor that it kept for the backward pass its size."""
    tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
    found = {}
    torch.manual_seed(0)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (found.update({x.data_ptr(): x.numel()}), x)[1], lambda x: x
    ):
        states = model(**tensors, **switches)[0]
        loss = states.sin().sum()
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return [loss.detach(), *gradients], list(found.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_without_keys_is_uniform_and_finite(dtype):
    model = RobertaPreLayerNormModel(tiny_config(initializer_range=0.2)).to(dtype).eval()
    inputs = {name: torch.from_numpy(value) for name, value in INPUTS["a fully masked row"].items()}
    record = model(**inputs, output_attentions=True)
    assert torch.isfinite(record.last_hidden_state).all()
    assert torch.all(record.attentions[0][1] == torch.tensor(1 / 11, dtype=dtype))
    with torch.no_grad():
        fused = model(**inputs).last_hidden_state
    # the fused kernel rounds at other places: a few spacings of numbers up to 4
    torch.testing.assert_close(fused, record.last_hidden_state.detach(), rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_pads_send_no_gradient_to_the_tables():
    model = RobertaPreLayerNormModel(tiny_config())
    model(torch.from_numpy(INPUTS["pads that are seen"]["input_ids"])).last_hidden_state.square().sum().backward()
    for table in (model.embeddings.word_embeddings, model.embeddings.position_embeddings):
        assert torch.count_nonzero(table.weight.grad[1]) == 0
        assert torch.count_nonzero(table.weight.grad) > 0


def test_plain_tuples():
    model = masked_lm().eval()
    logits, states = model(IDS, output_hidden_states=True, return_dict=False)
    assert logits.shape == (3, 11, 99)
    assert len(states) == 3
    loss, _ = model(IDS, labels=IDS, return_dict=False)
    assert loss.shape == ()
    assert RobertaPreLayerNormModel(tiny_config(), add_pooling_layer=False)(IDS, return_dict=False)[1] is None


def test_arrays_and_lists_are_taken():
    model = masked_lm().eval()
    expected = model(IDS).logits
    assert torch.equal(model(IDS.numpy()).logits, expected)
    assert torch.equal(model(IDS.tolist()).logits, expected)
    assert torch.equal(model(IDS.int()).logits, expected)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_loading_in_every_dtype(dtype, tmp_path):
    model = masked_lm()
    model.save_pretrained(tmp_path)
    loaded = RobertaPreLayerNormForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == getattr(torch, dtype)
    assert not loaded.training
    assert loaded.config.dtype == dtype
    assert {value.device.type for value in loaded.state_dict().values()} == {"cpu"}
    assert torch.equal(loaded.lm_head.dense.weight, model.lm_head.dense.weight.to(loaded.dtype))
    loaded.save_pretrained(tmp_path / "again")
    again = RobertaPreLayerNormForMaskedLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == loaded.dtype
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), loaded.parameters(), strict=True))
    with torch.no_grad():
        assert loaded(IDS, labels=IDS).loss.dtype == torch.promote_types(loaded.dtype, torch.float32)


def test_a_head_from_a_base_model_and_back(tmp_path):
    RobertaPreLayerNormModel(tiny_config()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"newly initialised: lm_head\.dense\.weight"):
        model, info = RobertaPreLayerNormForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == [name for name in schema.expand(tiny_config(), "ForMaskedLM") if "lm_head" in name]
    assert model.lm_head.decoder.weight is model.roberta_prelayernorm.embeddings.word_embeddings.weight
    assert 0.01 < model.lm_head.dense.weight.std() < 0.03  # drawn, not left empty
    model.save_pretrained(tmp_path / "head")
    base = RobertaPreLayerNormModel.from_pretrained(tmp_path / "head", add_pooling_layer=False)
    assert torch.equal(base(IDS).last_hidden_state, model.roberta_prelayernorm(IDS).last_hidden_state)


def test_training_learns():
    model = masked_lm()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_numpy_stays_writable():
    """Loading copies: training must not write into a memory-mapped file."""
    model = masked_lm()
    assert all(np.asarray(value.detach()).flags.writeable for value in model.parameters())


def test_hooks_see_what_comes_before_the_activation():
    """Without gradients the activation is computed in place, but not where somebody else holds the tensor."""
    model, ids = RobertaPreLayerNormModel(tiny_config(initializer_range=1.0)).eval(), IDS
    layer, seen = model.encoder.layer[0].intermediate, []
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        for register in (layer.dense.register_forward_hook, torch.nn.modules.module.register_module_forward_hook):
            handle = register(lambda module, given, result: seen.append(result) if module is layer.dense else None)
            assert torch.equal(model(ids).last_hidden_state, plain)
            handle.remove()
    assert (seen[0] < -0.2).any()  # which gelu never is
    assert torch.equal(*seen)
    torch.testing.assert_close(model(ids).last_hidden_state, plain)

"""The model with a value head: what it computes, what it is saved as, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from rlhf_ray import AutoModelForCausalLMWithValueHead, create_reference_model
from rlhf_ray.errors import ConfigError, ModelError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def model(tiny_model_dir: Path) -> AutoModelForCausalLMWithValueHead:
    """Its head is not zero."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.v_head.linear.weight.copy_(torch.linspace(-1, 1, 64).unsqueeze(0))
        model.v_head.linear.bias.fill_(0.25)
    return model


def gpt2(**settings: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64, **settings))


@torch.no_grad()
def test_forward_gives_logits_loss_and_values(model: AutoModelForCausalLMWithValueHead, tiny_model_dir: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    expected = plain(input_ids=IDS, labels=IDS)
    hidden = plain.model(input_ids=IDS).last_hidden_state
    logits, loss, values = model.eval()(input_ids=IDS, labels=IDS)
    assert torch.allclose(logits, expected.logits, atol=1e-5)
    assert float(loss) == pytest.approx(float(expected.loss), abs=1e-5)
    assert torch.allclose(values, hidden @ torch.linspace(-1, 1, 64) + 0.25, atol=1e-4)
    assert model(input_ids=IDS)[1] is None


@torch.no_grad()
def test_forward_goes_on_from_its_cache(model: AutoModelForCausalLMWithValueHead) -> None:
    whole, _, values = model.eval()(input_ids=IDS)
    *_, cache = model(input_ids=IDS[:, :3], return_past_key_values=True)
    last, _, last_value = model(input_ids=IDS[:, 3:], past_key_values=cache)
    assert torch.allclose(last[:, 0], whole[:, 3], atol=1e-4)
    assert torch.allclose(last_value[:, 0], values[:, 3], atol=1e-4)


@torch.no_grad()
def test_what_is_saved_comes_back_with_its_value_head(model: AutoModelForCausalLMWithValueHead, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    for mine, theirs in zip(model.eval()(input_ids=IDS)[::2], again.eval()(input_ids=IDS)[::2], strict=True):
        assert torch.equal(mine, theirs)
    assert (tmp_path / "tokenizer.json").is_file()  # what stood there has stayed


@torch.no_grad()
def test_what_is_saved_is_a_plain_folder_for_others(model: AutoModelForCausalLMWithValueHead, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    plain, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["unexpected_keys"]
    assert not loading["missing_keys"]
    assert torch.equal(plain.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS)[0])
    # vLLM reads every *.safetensors of the folder itself, and knows no v_head.
    names = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert not [name for name in names if "head" in name and name != "lm_head.weight"]
    assert not [*tmp_path.rglob("*.bin"), *tmp_path.rglob("*.pt")]


def test_a_value_head_that_trl_saved_is_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    """It stands among the model's weights there."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "old")
    head = {"v_head.summary.weight": torch.full((1, 64), 0.5), "v_head.summary.bias": torch.tensor([2.0])}
    save_file({**load_file(folder / "model.safetensors"), **head}, folder / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    assert torch.equal(model.v_head.linear.weight, torch.full((1, 64), 0.5))
    assert model.v_head.linear.bias.tolist() == [2.0]


def test_a_value_head_that_does_not_fit_is_refused(model: AutoModelForCausalLMWithValueHead, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    file = tmp_path / "value_head" / "model.safetensors"
    save_file({"v_head.summary.weight": torch.zeros(1, 3), "v_head.summary.bias": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r"the value head in .* cannot be read .*save the model again"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_a_model_in_memory_is_taken_with_its_dropout_off(tiny_model_dir: Path) -> None:
    """GPT-2 has layers for it; Llama's attention keeps a rate."""
    llama = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attention_dropout=0.5)
    for language_model in (gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), llama):
        language_model.train()
        assert not torch.equal(language_model(input_ids=IDS).logits, language_model(input_ids=IDS).logits)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(language_model).train()
        assert model.pretrained_model is language_model
        assert torch.equal(model(input_ids=IDS)[0], model(input_ids=IDS)[0])


def test_the_reference_is_a_frozen_copy(model: AutoModelForCausalLMWithValueHead) -> None:
    reference = create_reference_model(model)
    before = reference(input_ids=IDS)[0]
    with torch.no_grad():
        model.pretrained_model.model.norm.weight.mul_(2.0)
    assert torch.equal(reference(input_ids=IDS)[0], before)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"peft_config": object()}, r"peft_config = .* is not supported: all weights are trained"),
        ({"load_in_8bit": True}, r"load_in_8bit = True is not supported: .*float32"),
        ({"device_map": "auto"}, r"device_map = 'auto' is not supported: the trainer moves the model"),
        ({"torch_dtype": torch.bfloat16}, r"torch_dtype = torch\.bfloat16.*mixed_precision"),
        ({"v_head_init_strategy": "normal"}, r"v_head_init_strategy.*starts at zero"),
        ({"summary_dropout_prob": 0.1}, r"summary_dropout_prob.*dropout is off"),
        ({"revision": "main"}, r"revision = 'main' is not supported: load the model with transformers"),
    ],
)
def test_an_option_that_is_not_carried_out_is_refused(
    tiny_model_dir: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model_dir, **options)


def test_options_that_are_off_are_taken(tiny_model_dir: Path) -> None:
    AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny_model_dir, peft_config=None, load_in_8bit=False, torch_dtype=torch.float32, trust_remote_code=True
    )


def test_a_model_that_cannot_be_trained_is_refused(model: AutoModelForCausalLMWithValueHead) -> None:
    wrap = AutoModelForCausalLMWithValueHead.from_pretrained
    with pytest.raises(ModelError, match=r"weights in torch\.bfloat16, and they are trained in float32.*model\.float"):
        wrap(gpt2().to(torch.bfloat16))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    with pytest.raises(ModelError, match="encoder-decoder, and only decoders are trained here"):
        wrap(T5ForConditionalGeneration(T5Config(**sizes)))
    adapted = gpt2()
    adapted.peft_config = {}
    with pytest.raises(ModelError, match=r"has adapters.*merge_and_unload"):
        wrap(adapted)
    with pytest.raises(ModelError, match="was given a AutoModelForCausalLMWithValueHead; give a hub id"):
        wrap(model)
    with pytest.raises(ModelError, match="no folder, no file and no hub id"):
        wrap("./nowhere/at/all")
    with pytest.raises(ConfigError, match=r"num_shared_layers = 2, .* not supported"):
        create_reference_model(model, num_shared_layers=2)


def test_the_seq2seq_model_is_refused_at_its_import() -> None:
    with pytest.raises(ImportError, match=r"trains decoders only.*import AutoModelForCausalLMWithValueHead"):
        from rlhf_ray import AutoModelForSeq2SeqLMWithValueHead  # noqa: F401

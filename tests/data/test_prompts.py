"""Prompt files are refused line by line, and prompts come in an order that a resumed run repeats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.prompts import PromptStream, check_prompts, encode_prompt, read_prompts, sampling_seed
from rlhf_ray.errors import DataError, ModelError

WORDS = ["<unk>", "<bos>", "the", "train", "user", "assistant", ":"]


def written(folder: Path, content: str | bytes) -> str:
    file = folder / "prompts.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def word_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", unk_token="<unk>")
    tokenizer.chat_template = chat_template
    return tokenizer


# Reading


def test_prompts_are_read_in_the_order_of_their_lines_and_other_keys_are_ignored(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "Im Zug saß"}\r\n{"id": 7, "prompt": " A letter "}\n\n')
    assert read_prompts(path) == ["Im Zug saß", " A letter "]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\n')) == ["a"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not json", "line 2 is not valid JSON"),
        ('{"prompt": "cut off', "line 2 is not valid JSON"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ('["prompt"]', 'line 2 is no object with a string under "prompt"'),
        ('{"text": "a"}', 'line 2 is no object with a string under "prompt"'),
        ('{"prompt": 3}', 'line 2 is no object with a string under "prompt"'),
        ('{"prompt": "  \\n"}', "line 2 has an empty prompt"),
        ('{"prompt": "\\ud83d"}', "line 2 has half of a surrogate pair"),
        ("", "line 2 is empty"),
    ],
)
def test_a_bad_line_is_named_with_its_remedy(tmp_path: Path, line: str, complaint: str) -> None:
    path = written(tmp_path, '{"prompt": "a"}\n' + line + '\n{"prompt": "b"}\n')
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert complaint in str(caught.value)
    assert path in str(caught.value)
    assert "or remove it" in str(caught.value)


def test_a_line_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, b'{"prompt": "a"}\n{"prompt": "sa\xdf"}\n')
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        read_prompts(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="holds no prompt; write one JSON object"):
        read_prompts(written(tmp_path, content))


def test_a_missing_file_names_the_keys_to_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: No such file.*prompts\.path"):
        read_prompts(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match=r"Is a directory"):
        read_prompts(str(tmp_path))


def test_packaged_prompts_are_found_by_name_and_an_unknown_name_lists_them() -> None:
    assert len(read_prompts("recipe:demo_prompts.jsonl")) >= 100
    with pytest.raises(DataError, match=r"choose one of: .*demo_prompts\.jsonl"):
        read_prompts("recipe:demo_prompt.jsonl")


# Encoding


def test_text_is_tokenised_as_it_stands() -> None:
    assert encode_prompt("the train", word_tokenizer(), format="text") == [1, 2, 3]


def test_chat_is_a_users_turn_up_to_where_the_assistant_begins() -> None:
    template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    ids = encode_prompt("the train", word_tokenizer(template), format="chat")
    assert [WORDS[i] for i in ids] == ["user", ":", "the", "train", "assistant", ":"]


def test_chat_without_a_template_names_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"no chat template; set prompts\.format to text"):
        encode_prompt("the train", word_tokenizer(), format="chat")


# Checking


def check(*encoded: list[int], max_tokens: int = 10, max_new_tokens: int = 5, context_length: int = 12) -> None:
    check_prompts(
        "p.jsonl", encoded, max_tokens=max_tokens, max_new_tokens=max_new_tokens, context_length=context_length
    )


def test_prompts_up_to_the_limits_pass() -> None:
    check([1] * 6, [1])
    check([1] * 10, context_length=100)


def test_a_prompt_above_the_limit_is_named() -> None:
    with pytest.raises(DataError, match=r"p\.jsonl, line 2: the prompt has 11 tokens and prompts\.max_tokens = 10"):
        check([1], [1] * 11)


def test_a_prompt_that_leaves_no_room_for_a_whole_response_is_named() -> None:
    with pytest.raises(
        DataError, match=r"line 1: the prompt's 7 tokens, sampling\.max_new_tokens = 5 and EOS .*context of 12"
    ):
        check([1] * 7)


def test_a_prompt_without_tokens_is_named() -> None:
    with pytest.raises(DataError, match="line 2: the tokenizer makes no token"):
        check([1], [])


# The stream

PROMPTS = [(f"text {i}", (i, i + 1)) for i in range(20)]


def texts(stream: PromptStream, first: int, last: int) -> list[str]:
    return [stream.prompt(i).text for i in range(first, last)]


def test_every_epoch_goes_once_through_all_prompts_in_an_order_of_its_own() -> None:
    stream = PromptStream(PROMPTS, seed=0)
    epochs = [texts(stream, start, start + 20) for start in (0, 20, 40)]
    assert all(sorted(epoch) == sorted(text for text, _ in PROMPTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_prompt_is_a_pure_function_of_its_ordinal_and_the_seed() -> None:
    one, other = PromptStream(PROMPTS, seed=3), PromptStream(PROMPTS, seed=3)
    backwards = [other.prompt(i) for i in reversed(range(60))]
    assert [one.prompt(i) for i in range(60)] == backwards[::-1]
    assert texts(one, 0, 20) != texts(PromptStream(PROMPTS, seed=4), 0, 20)


def test_the_order_and_the_seeds_never_change_between_releases() -> None:
    stream = PromptStream(PROMPTS, seed=0)
    assert texts(stream, 0, 3) == ["text 4", "text 12", "text 9"]
    assert [stream.prompt(i).seed for i in range(3)] == [1534234106, 1863832401, 1640366647]


def test_a_prompt_carries_its_own_tokens_and_id() -> None:
    prompt = PromptStream(PROMPTS, seed=0).prompt(33)
    assert (prompt.text, prompt.token_ids) in PROMPTS
    assert prompt.prompt_id == 33
    assert prompt.seed == sampling_seed(0, 33)
    assert prompt.completions == 1
    assert PromptStream(PROMPTS, seed=0, completions=4).prompt(33) == replace(prompt, completions=4)


def test_sampling_seeds_differ_between_prompts_and_runs_and_fit_31_bits() -> None:
    seeds = {sampling_seed(run, i) for run in range(3) for i in range(1000)}
    assert len(seeds) == 3000
    assert min(seeds) >= 0
    assert max(seeds) < 2**31


def test_a_stream_needs_prompts() -> None:
    with pytest.raises(DataError, match=r"prompts\.path"):
        PromptStream([], seed=0)

"""A small tokenizer in the released form, for tests: the real vocabulary is not shipped.

Every word of the templates is one token, as it is in the real one.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from minqwen.prompt import EDIT, T2I
from minqwen.tokenizer import WORDS

SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|>
<|video_pad|>""".split()
CROSSING = ["1 2", "a 1", "a ,", "a Ġ", "a Ċ", "Ċ a"]  # merges for no right splitting; Ġ is space, Ċ newline
PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>"]  # added, but not special


def write_tokenizer(folder: Path) -> Path:
    """vocab.json, merges.txt and tokenizer_config.json: what the released text-to-image repositories have."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = ["".join(t.text for t in (T2I, EDIT)), "Picture a cat's café naïve 你好 世界 don't 한국어"]
    alphabet, size = pre_tokenizers.ByteLevel.alphabet(), {"vocab_size": 2000, "min_frequency": 1}
    trainer = trainers.BpeTrainer(**size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(words, trainer)
    bpe.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab |= {merge.replace(" ", ""): len(vocab) + n for n, merge in enumerate(CROSSING)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with (folder / "merges.txt").open("a", encoding="utf-8") as merges:
        merges.write("\n".join(CROSSING) + "\n")
    added = {
        len(vocab) + n: {"content": token, "special": token in SPECIAL, "normalized": False,
                                   "lstrip": False, "rstrip": False, "single_word": False}
        for n, token in enumerate(SPECIAL + PLAIN)
    }  # fmt: skip
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    config |= {"pad_token": SPECIAL[0], "eos_token": "<|im_end|>", "additional_special_tokens": SPECIAL[1:]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder

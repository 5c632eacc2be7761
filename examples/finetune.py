"""Fine-tunes a GPT-2 on your texts, all of its weights or adapters to them (LoRA), and saves a model of its own.

    python examples/finetune.py my_text.txt --model_size 124M --name mine
    python examples/finetune.py my_chats.jsonl --model_size 124M --name mine --lora_rank 8
    python gpt2.py "..." --model_size mine

LoRA leaves the weights as they are and learns small matrices A and B, whose product is added to some of them. They lie
beside the model under the names of PEFT, a library for PyTorch, and can be applied to a model again:

    python examples/finetune.py --merge models/mine --model_size 124M --name again
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out

if __name__ == "__main__":
    from cli import start

    start("numpy", "regex", "tqdm")

import lora
import numpy as np
import training
from evaluate import scores
from lora import load_adapters, new_adapters, save_adapters, with_adapters  # noqa: F401
from recipe import BASE_FLAGS, complete, with_flags
from saving import alone, copy_tokenizer, replaced
from texts import END, hold_out, ids_of, note_parts_of_characters

from cli import fail, mistakes, need, note, run
from files.checkpoint import save_checkpoint
from utils import ModelError, load_encoder_hparams_and_params


def examples_of(encoder, documents, n_ctx):
    """[(ids, how many of the last are learned)] of prompts and completions: only the latter are.

    A completion ends with <|endoftext|>, which also stands for an empty prompt. Ends with one line for those too long.
    """
    end, examples = encoder.encoder[END], []
    for document in documents:
        completion = [*ids_of(encoder, document["completion"].removesuffix(END)), end]
        examples.append(((ids_of(encoder, document["prompt"]) or [end]) + completion, len(completion)))
    too_long = [
        document["where"] for document, (ids, _) in zip(documents, examples, strict=True) if len(ids) > n_ctx + 1
    ]
    if too_long:
        more = f" (as are {len(too_long) - 1} others)" if too_long[1:] else ""
        fail(f"{too_long[0]} is longer than the {n_ctx} tokens that the model sees at once{more}")
    return examples


class Pairs:
    """A task: to complete prompts. examples, held_out: [(ids, how many of the last are the completion's)]."""

    unit, scale = "nats per token", 1.0

    def __init__(self, encoder, examples, held_out, n_head, batch_size):
        self.encoder, self.n_head = encoder, n_head
        self.held_out = sorted(held_out, key=lambda example: len(example[0]))
        ids, n_learned = self.held_out[0]
        self.data, self.prompt = training.Rows(padded(examples), batch_size), encoder.decode(ids[:-n_learned])

    def evaluate(self, params, learned):
        """(nats per token of the completions held out, a line that says so, with a sample)."""
        params = training.in_small_batches(params)
        nats = np.concatenate([nats for nats, _ in scores(params, self.held_out, self.n_head)]).mean()
        line = f"held out {nats:.4f} nats per token\n{training.indented(self.prompt)}"
        return nats, f"{line}\n{training.sample(self.encoder, params, self.n_head, self.prompt)}"


def padded(examples):
    """{"ids": [n_rows, n+1], "counted": [n_rows, n]} of examples: 1 for what is learned, 0 for prompts and padding."""
    n = max(len(ids) for ids, _ in examples)
    rows = {"ids": np.zeros((len(examples), n), int), "counted": np.zeros((len(examples), n - 1), np.float32)}
    for i, (ids, n_learned) in enumerate(examples):
        rows["ids"][i, : len(ids)] = ids
        rows["counted"][i, len(ids) - 1 - n_learned : len(ids) - 1] = 1
    return rows


@with_flags(BASE_FLAGS)
def main(*files: str, merge: str = "", **recipe):
    """Fine-tunes a GPT-2 on texts.

    Args:
        files: UTF-8 texts, folders with all that is in them, or globs; documents are parted by <|endoftext|>, or one a
            file; or .jsonl, .json (an array) or .csv with {"text"}, or with {"prompt", "completion"} or chats of
            {"messages"}, of which only the completions or answers are learned; the last tenth is held out
        merge: do not train, but apply the adapters in this folder to the model, and save the result
    """
    options = complete(main, recipe)
    if merge:
        return save_merged(merge, files, options)
    lora_rank = options["lora_rank"]
    options = lora.complete(options, is_part=bool(lora_rank))
    model_dir, settings = training.begin(options, *["safetensors"][: bool(lora_rank)])
    documents, others, settings["data"] = training.read_data(
        files, options["held_out"], ("text",), ("prompt", "completion")
    )
    model_size, models_dir = options["model_size"], options["models_dir"]
    with mistakes(ModelError):
        encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    settings["base"] = training.base_of(os.path.join(models_dir, model_size))
    n_head, n_ctx, batch_size = hparams["n_head"], training.context(options["n_ctx"], hparams), options["batch_size"]

    if "text" in documents[0]:
        texts, others = ([document["text"] for document in part] for part in (documents, others))
        texts, others = (texts, others) if others else hold_out(texts)
        task = training.Texts(encoder, texts, others, n_ctx, n_head, batch_size)
        ids = task.data.ids
    else:
        examples, others = (examples_of(encoder, part, n_ctx) for part in (documents, others))
        n = 0 if others else max(1, len(examples) // 10)
        if len(examples) <= n:
            fail("there are too few pairs to learn from: give two or more")
        examples, others = examples[: len(examples) - n], others or examples[-n:]
        task = Pairs(encoder, examples, others, n_head, batch_size)
        ids = [i for row, _ in examples for i in row]
    note_parts_of_characters(encoder, ids, f"train.py makes a tokenizer of the text's own, that of {model_size} is not")

    learned, frozen = lora.parts_of(params, options, settings["seed"])
    tokenizer_dir = os.path.join(models_dir, model_size)
    training.train(model_dir, tokenizer_dir, hparams, learned, frozen, task, settings, options["resume"])


def save_merged(merge, files, options):
    """Saves a model with the adapters in the folder merge applied to it. Ends with one line for flags of training."""
    may_be = "model_size", "name", "models_dir"
    unused = ["files"][: len(files)]
    unused += [f"--{key}" for key, value in options.items() if key not in may_be and value != complete(main, {})[key]]
    if unused:
        fail(f"--merge applies adapters and learns nothing: it takes no {', '.join(unused)}")
    need("safetensors")
    model_size, models_dir = options["model_size"], options["models_dir"]
    model_dir = training.new_model(options["name"], models_dir)
    training.refuse_existing(model_dir)
    with mistakes(ModelError):
        _, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    adapters, scale, base = load_adapters(merge, params)
    if base and base != model_size and os.path.isdir(os.path.join(models_dir, base)):
        note(f"the adapters in {merge} were made for {base}, and are applied to {model_size}")
    with alone(model_dir), mistakes(OSError, f"{model_dir} cannot be saved: "):
        training.refuse_existing(model_dir)  # it may have come meanwhile
        with replaced(model_dir) as folder:
            copy_tokenizer(os.path.join(models_dir, model_size), folder)
            save_checkpoint(folder, hparams, with_adapters(params, adapters, scale))


if __name__ == "__main__":
    run(main, "finetune.py: stopped before the first step: nothing was written")

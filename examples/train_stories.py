"""Train the bundled story model: `python examples/train_stories.py OUT.gguf` (needs torch, tokenizers, gguf).

The text is made here, by a small story grammar with fixed seeds, so nothing is downloaded and the run can be repeated.
A llama-architecture transformer of about 1.8 million parameters learns it and is written as an F16 GGUF file with a
byte-level BPE vocabulary of at most 1024 entries. On two CPU cores the default settings take about half an hour.

Choices in the grammar are skewed on purpose (the first of a list is the likeliest): the trained model then has clear
favourites, and greedy decoding does not hang on the last bit of a logit.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

END = "<|endoftext|>"

GIRLS = ["Lily", "Mia", "Anna", "Rose", "Emma", "Zoe"]
BOYS = ["Tom", "Ben", "Sam", "Max", "Leo", "Tim"]
ANIMALS = ["dog", "cat", "rabbit", "bird", "fox", "frog", "duck", "mouse"]
ANIMAL_NAMES = ["Spot", "Fluffy", "Pip", "Coco", "Biscuit", "Sunny"]
COLOURS = ["red", "blue", "green", "yellow", "shiny", "white"]
TOYS = ["ball", "kite", "boat", "hat", "drum", "balloon", "toy car", "book"]
PLACES = ["park", "forest", "garden", "beach", "farm", "river", "hill"]
TRAITS = ["little", "kind", "happy", "brave", "curious", "quiet"]
FOODS = ["cake", "apples", "bread", "soup", "cookies", "berries"]
WEATHER = ["sunny", "warm", "windy", "cold", "bright"]
HELPERS = ["an old woman", "a kind farmer", "a big bear", "a wise owl", "a tall man"]


class Story:
    """One story: the cast is chosen once, so names, pronouns and things stay the same from first to last sentence."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        girl = rng.random() < 0.6
        self.name = self.pick(GIRLS if girl else BOYS)
        self.kid = "girl" if girl else "boy"
        self.he, self.him, self.his = ("she", "her", "her") if girl else ("he", "him", "his")
        self.trait, self.place, self.toy, self.colour = (self.pick(x) for x in (TRAITS, PLACES, TOYS, COLOURS))
        self.animal, self.pet = self.pick(ANIMALS), self.pick(ANIMAL_NAMES)
        self.food, self.weather, self.helper = self.pick(FOODS), self.pick(WEATHER), self.pick(HELPERS)

    def pick(self, options: list[str]) -> str:
        weights = [0.55**i for i in range(len(options))]
        return self.rng.choices(options, weights)[0]

    def opening(self) -> str:
        n, k, t = self.name, self.kid, self.trait
        return self.pick([
            f"Once upon a time, there was a {t} {k} named {n}.",
            f"Once upon a time, there lived a {t} {k} called {n}.",
            f"One day, a {t} {k} named {n} woke up early.",
            f"There was a {t} {k} named {n} who lived near the {self.place}.",
            f"{n} was a {t} {k} who lived in a small house.",
            f"In a small village there lived a {t} {k} named {n}.",
        ])

    def middle(self) -> list[str]:
        n, he, him, his = self.name, self.he, self.him, self.his
        thing = f"{self.colour} {self.toy}"
        he_up = he.capitalize()
        intro = self.pick([
            f"{he_up} had a {thing} that {he} loved very much.",
            f"{he_up} loved to play with {his} {thing} every day.",
            f"{his.capitalize()} best friend was a {self.animal} named {self.pet}.",
        ])
        walk = self.pick([
            f"One {self.weather} day, {n} went to the {self.place} with {his} {thing}.",
            f"One {self.weather} morning, {n} and {self.pet} the {self.animal} walked to the {self.place}.",
        ])
        lost = [
            f"But then the wind blew, and the {self.toy} was gone.",
            f"{n} looked and looked, but {he} could not find the {self.toy}.",
            f"{he_up} was very sad and began to cry.",
            self.pick([
                f"Then {self.pet} the {self.animal} came to help {him}.",
                f"Then {self.helper} saw {him} and asked, \"Why are you sad?\"",
            ]),
            f"\"I lost my {thing},\" said {n}.",
            self.pick([
                f"They looked behind a big tree, and there was the {self.toy}!",
                f"They looked under a bush, and there was the {self.toy}!",
                f"They looked near the water, and there was the {self.toy}!",
            ]),
            f"{n} was so happy that {he} jumped up and down.",
        ]
        shared = [
            f"There {he} met a small {self.animal} named {self.pet}.",
            f"The {self.animal} was hungry and had nothing to eat.",
            f"{n} had some {self.food} in {his} bag.",
            f"\"Would you like some of my {self.food}?\" asked {n}.",
            f"\"Yes, please,\" said {self.pet}. \"You are very kind.\"",
            f"They sat down in the grass and ate the {self.food} together.",
        ]
        stuck = [
            f"On the way {he} heard a small voice. \"Help! Help!\"",
            f"It was a {self.animal} named {self.pet}, and it was stuck in the mud.",
            f"{n} was afraid, but {he} wanted to help.",
            self.pick([
                f"{he_up} found a long stick and pulled as hard as {he} could.",
                f"{he_up} called {self.helper}, and they pulled together.",
            ]),
            f"At last the {self.animal} was free.",
            f"\"Thank you, {n}!\" said {self.pet}. \"You are very brave.\"",
        ]
        rain = [
            f"{he_up} wanted to play with {his} {thing} all day.",
            "But soon the sky was dark, and it began to rain.",
            f"{n} ran under a big tree and waited.",
            f"A {self.animal} was there too, and it was wet and cold.",
            f"{n} gave it {his} coat to keep it warm.",
            "After a while the rain stopped, and the sun came out.",
            f"{n} and the {self.animal} played with the {self.toy} until the evening.",
        ]
        plot = self.rng.choices([lost, shared, stuck, rain], [0.45, 0.27, 0.17, 0.11])[0]
        return [intro, walk, *plot]

    def ending(self) -> list[str]:
        n, he, his = self.name, self.he, self.his
        last = self.pick([
            "From that day on, they were best friends.",
            f"{n} learned that it is good to help others.",
            f"{n} learned that friends can be found everywhere.",
            "And they all lived happily ever after.",
        ])
        home = self.pick([
            f"When {he} came home, {n} told {his} mom all about it.",
            f"That night, {n} slept well and had a good dream.",
            f"Then {n} went home with a big smile.",
        ])
        return [home, last]

    def text(self) -> str:
        sentences = [self.opening(), *self.middle(), *self.ending()]
        if self.rng.random() < 0.2:
            del sentences[0]  # a story may begin in its middle: a prompt does so too
        return " ".join(sentences)


def stories(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    return [Story(rng).text() for _ in range(n)]


def train(out: Path, steps: int, seed: int, threads: int) -> None:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from torch import nn

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    n_vocab_max, n_embd, n_layer, n_head, n_head_kv, n_ff, n_ctx = 1024, 192, 4, 6, 2, 512, 512
    d_head, eps, base = n_embd // n_head, 1e-5, 10000.0

    text = stories(seed, 60_000)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(text[:20_000], trainers.BpeTrainer(
        vocab_size=n_vocab_max, special_tokens=[END], initial_alphabet=alphabet, show_progress=False))
    end, n_vocab = bpe.token_to_id(END), bpe.get_vocab_size()
    data = torch.tensor([t for e in bpe.encode_batch(text) for t in (end, *e.ids)])
    print(f"{len(data):,} tokens, vocabulary {n_vocab}", flush=True)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            lin = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
            self.attn_norm, self.ffn_norm = nn.Parameter(torch.ones(n_embd)), nn.Parameter(torch.ones(n_embd))
            self.attn_q, self.attn_output = lin(n_embd, n_embd), lin(n_embd, n_embd)
            self.attn_k, self.attn_v = lin(n_embd, n_head_kv * d_head), lin(n_embd, n_head_kv * d_head)
            self.ffn_gate, self.ffn_up, self.ffn_down = lin(n_embd, n_ff), lin(n_embd, n_ff), lin(n_ff, n_embd)

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            b, t, _ = x.shape

            def heads(y: torch.Tensor, rope: bool) -> torch.Tensor:
                y = y.view(b, t, -1, d_head)
                if rope:  # neighbouring pairs turn together, as llama's GGUF layout has it
                    even, odd = y[..., 0::2], y[..., 1::2]
                    y = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
                return y.transpose(1, 2)

            h = F.rms_norm(x, (n_embd,), self.attn_norm, eps)
            q, k, v = heads(self.attn_q(h), True), heads(self.attn_k(h), True), heads(self.attn_v(h), False)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + self.attn_output(a.transpose(1, 2).reshape(b, t, n_embd))
            h = F.rms_norm(x, (n_embd,), self.ffn_norm, eps)
            return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token_embd = nn.Embedding(n_vocab, n_embd)
            self.blk = nn.ModuleList(Block() for _ in range(n_layer))
            self.output_norm = nn.Parameter(torch.ones(n_embd))
            for name, p in self.named_parameters():
                if p.dim() == 2:
                    small = name.endswith(("attn_output.weight", "ffn_down.weight"))
                    nn.init.normal_(p, std=0.02 / (math.sqrt(2 * n_layer) if small else 1))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            t = tokens.shape[1]
            freq = base ** (-torch.arange(0, d_head, 2) / d_head)
            angle = (torch.arange(t)[:, None] * freq)[:, None, :]
            x = self.token_embd(tokens)
            for block in self.blk:
                x = block(x, angle.cos(), angle.sin())
            return F.rms_norm(x, (n_embd,), self.output_norm, eps) @ self.token_embd.weight.T

    model = Model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    rng, batch, length, start = np.random.default_rng(seed), 12, 384, time.time()
    for step in range(steps):
        warm, frac = min(1.0, (step + 1) / 50), step / steps
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * warm * (0.5 + 0.5 * math.cos(math.pi * frac)) + 1e-5
        at = rng.integers(0, len(data) - length - 1, batch)
        xy = torch.stack([data[i : i + length + 1] for i in at.tolist()])
        loss = F.cross_entropy(model(xy[:, :-1]).flatten(0, 1), xy[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True)

    import json

    import gguf

    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name("ggmq stories")
    writer.add_description("Short stories in plain English; made by examples/train_stories.py of ggmq")
    writer.add_license("MIT")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_rope_dimension_count(d_head)
    writer.add_rope_freq_base(base)
    writer.add_layer_norm_rms_eps(eps)
    writer.add_vocab_size(n_vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    spec = json.loads(bpe.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([int(gguf.TokenType.CONTROL if t == END else gguf.TokenType.NORMAL) for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["merges"]])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(True)
    for name, p in model.state_dict().items():
        array = p.detach().numpy()
        if array.ndim == 1:
            writer.add_tensor(f"{name}.weight", array.astype(np.float32))
        else:
            writer.add_tensor(name, array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{out}: {out.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the bundled story model and write it as GGUF.")
    parser.add_argument("out", type=Path, help="the GGUF file to write")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    train(args.out, args.steps, args.seed, args.threads)

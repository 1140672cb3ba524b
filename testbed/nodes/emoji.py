"""The emoji codec: prompts to embeddings, pictures to latents and back."""
import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file

TOKENS = 6
BLOCK = 4
PAD = "<pad>"


def split_words(prompt):
    """Words of one prompt; the words after "on" are marked as upper and lower background."""
    name, _, background = prompt.lower().partition(" on ")
    colours = [colour for colour in background.split() if colour != "and"]
    marks = ("on:", "and:")
    return name.split() + [mark + colour for mark, colour in zip(marks, colours)]


def blocks(pictures):
    """Pictures [B,3,H,W] as rows of 4x4 blocks [B,H/4,W/4,48]."""
    b, c, h, w = pictures.shape
    cells = pictures.reshape(b, c, h // BLOCK, BLOCK, w // BLOCK, BLOCK)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(b, h // BLOCK, w // BLOCK, -1)


def unblocks(cells):
    """Rows of 4x4 blocks [B,h,w,48] as pictures [B,3,4h,4w]."""
    b, h, w, _ = cells.shape
    cells = cells.reshape(b, h, w, 3, BLOCK, BLOCK).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(b, 3, h * BLOCK, w * BLOCK)


class Codec:
    """A vocabulary with its embedding table [V,D] and a linear picture code of 48 to C numbers."""

    def __init__(self, vocabulary, table, mean, encoder, decoder):
        self.index = {word: i for i, word in enumerate(vocabulary)}
        self.table, self.mean, self.encoder, self.decoder = table, mean, encoder, decoder

    @classmethod
    def load(cls, path):
        """The codec stored in one safetensors file."""
        with safe_open(path, framework="pt") as file:
            vocabulary = json.loads(file.metadata()["vocabulary"])
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}
        return cls(vocabulary, **tensors)

    def save(self, path):
        """Write table, picture code and vocabulary to one safetensors file."""
        names = ("table", "mean", "encoder", "decoder")
        tensors = {name: getattr(self, name).detach().float().contiguous() for name in names}
        save_file(tensors, path, metadata={"vocabulary": json.dumps(list(self.index))})

    def tokens(self, prompts):
        """Token numbers [B,TOKENS] of the prompts; unknown words are left out."""
        pad = [self.index[PAD]] * TOKENS
        rows = [[self.index[w] for w in split_words(p) if w in self.index] for p in prompts]
        return torch.tensor([(row + pad)[:TOKENS] for row in rows])

    def embed(self, tokens):
        """Context [B,TOKENS,D] and its mean [B,D] for token numbers [B,TOKENS]."""
        context = torch.nn.functional.embedding(tokens, self.table)
        return context, context.mean(1)

    def encode(self, pictures):
        """Latents [B,C,H/4,W/4] of pictures [B,3,H,W] in 0..1."""
        return ((blocks(pictures) - self.mean) @ self.encoder).permute(0, 3, 1, 2)

    def decode(self, latents):
        """Pictures [B,3,4h,4w] in 0..1 of latents [B,C,h,w]."""
        return unblocks(latents.permute(0, 2, 3, 1) @ self.decoder + self.mean).clamp(0, 1)

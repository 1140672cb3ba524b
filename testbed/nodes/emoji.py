"""The emoji codecs: prompts to embeddings, pictures or clips to latents and back."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

MODELS = Path(__file__).resolve().parent.parent / "models"
TOKENS = 6
BLOCK = 4
CELL, GROUP = 8, 4  # side in pixels and frames of a clip's cell
WIDE = 4096  # numbers a token that Wan expects
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


def clip_cells(clips):
    """Clips [B,1+4t,3,H,W] as rows of cells [B,t+1,H/8,W/8,768]; the first frame stands for four."""
    b, _, c, h, w = clips.shape
    frames = torch.cat([clips[:, :1].expand(-1, GROUP - 1, -1, -1, -1), clips], 1)
    cells = frames.reshape(b, -1, GROUP, c, h // CELL, CELL, w // CELL, CELL)
    return cells.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4)


def clips_of(cells):
    """Rows of cells [B,t+1,h,w,768] as clips [B,1+4t,3,8h,8w]; the mean of the first four is the first frame."""
    b, t, h, w, _ = cells.shape
    cells = cells.reshape(b, t, h, w, GROUP, 3, CELL, CELL).permute(0, 1, 4, 5, 2, 6, 3, 7)
    frames = cells.reshape(b, t * GROUP, 3, h * CELL, w * CELL)
    return torch.cat([frames[:, :GROUP].mean(1, keepdim=True), frames[:, GROUP:]], 1)


class Codec:
    """A vocabulary with its embedding table [V,D] and a linear picture code of 48 to C numbers."""

    file = "emoji_text.safetensors"
    cut, join = staticmethod(blocks), staticmethod(unblocks)

    def __init__(self, vocabulary, table, mean, encoder, decoder):
        self.index = {word: i for i, word in enumerate(vocabulary)}
        self.table, self.mean, self.encoder, self.decoder = table, mean, encoder, decoder

    @classmethod
    def load(cls, path):
        """The codec stored in one safetensors file."""
        with safe_open(path, framework="pt") as file:
            vocabulary = json.loads(file.metadata()["vocabulary"])
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a mapping)
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
        return ((self.cut(pictures) - self.mean) @ self.encoder).movedim(-1, 1)

    def decode(self, latents):
        """Pictures [B,3,4h,4w] in 0..1 of latents [B,C,h,w]."""
        return self.join(latents.movedim(1, -1) @ self.decoder + self.mean).clamp(0, 1)


class ClipCodec(Codec):
    """The same for clips: 768 to C numbers, latents [B,C,t+1,H/8,W/8] of clips [B,1+4t,3,H,W].

    Tokens are as wide as Wan's text encoder makes them, zeros after the first D numbers.
    """

    cut, join = staticmethod(clip_cells), staticmethod(clips_of)

    def embed(self, tokens):
        """Context [B,TOKENS,WIDE] and the mean of its first numbers [B,D] for token numbers [B,TOKENS]."""
        context, pooled = super().embed(tokens)
        return torch.nn.functional.pad(context, (0, WIDE - context.shape[-1])), pooled


class PhotoCodec(Codec):
    """The same for photographs."""

    file = "photos_text.safetensors"


# model -> its kind of codec; what is distilled has that of its teacher
CODECS = {"emoji_mmdit": Codec, "emoji_unet": Codec, "emoji_wan": ClipCodec, "photos_lumina": PhotoCodec}


def load_codec(model):
    """The codec of a model, a name in CODECS."""
    return CODECS[model].load(MODELS / model / CODECS[model].file)


def conditioning(model, prompts):
    """The host's conditioning of the prompts for a model, one row a prompt."""
    codec = load_codec(model)
    context, pooled = codec.embed(codec.tokens(prompts))
    return [[context, {"pooled_output": pooled}]]

"""The SimCLR model: a torchvision ResNet with a projection head; and loading its encoder from a checkpoint."""

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from sogclr import InputError, one_line
from sogclr.checkpoint import plain_names

ARCHITECTURES = torchvision.models.list_models(
    module=torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])


def resnet(arch, stem="imagenet", **kwargs):
    """A torchvision ResNet. `stem="cifar"` makes its first convolution 3x3 with stride 1 and drops the max-pool.

    `kwargs` are passed to torchvision (`num_classes`, `zero_init_residual`).
    """
    encoder = torchvision.models.get_model(arch, weights=None, **kwargs)
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    for module in encoder.modules():        # torchvision has no argument for the kind of convolution
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.groups == 1:
            module.__class__ = Conv3x3
    return encoder


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1 that, on a CPU, computes a single output pixel as a matrix product with the
    weights that meet the image and not only its padding.

    ResNets have such outputs in the last layer at up to 32 pixels with the imagenet stem. Without AVX-512, torch's
    convolution is so slow there that this halves the time of ResNet-18's training step.
    """

    def forward(self, x):
        """[B, C, H, W] -> [B, out_channels, H / stride, W / stride], rounded up"""
        height, width = x.shape[-2:]
        if not x.is_cpu or max(height, width) > self.stride[0]:
            return super().forward(x)
        weight = F.pad(self.weight, (-1, width - 2, -1, height - 2))        # [out_channels, C, H, W]: cropped
        return F.linear(x.flatten(1), weight.flatten(1))[..., None, None]


def choose_stem(stem, image_size):
    """Resolve `--stem`: "auto" is the cifar stem up to 32 pixels and the imagenet stem above."""
    return stem if stem != "auto" else "cifar" if image_size <= 32 else "imagenet"


def projection_head(num_layers, input_dim, hidden_dim, output_dim):
    """The MLP of SimCLR (arXiv 2002.05709) as in MoCo v3: `num_layers` linear layers without bias, each but the last
    followed by BatchNorm and ReLU, the last by BatchNorm without affine parameters.
    """
    layers = []
    for layer in range(num_layers):
        last = layer == num_layers - 1
        width = output_dim if last else hidden_dim
        layers.append(nn.Linear(input_dim, width, bias=False))
        layers += [nn.BatchNorm1d(width, affine=False)] if last else [nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        input_dim = width
    return nn.Sequential(*layers)


def memory_format(device, dtype):
    """The memory format of weights and images for training in this dtype: channels_last on a GPU, and for bf16 on a
    CPU; in float32, CPUs train small batches faster in contiguous format.
    """
    return torch.contiguous_format if device.type == "cpu" and dtype == torch.float32 else torch.channels_last


class SimCLR(nn.Module):
    """An encoder whose classifier is replaced by a projection head.

    base_encoder: a torchvision ResNet; its `fc` is replaced.
    dim: D, the projection dimension; mlp_dim: width of the head's hidden layers; num_proj_layers: its linear layers.
    """

    def __init__(self, base_encoder, dim=128, mlp_dim=2048, num_proj_layers=2):
        super().__init__()
        self.base_encoder = base_encoder
        self.base_encoder.fc = projection_head(num_proj_layers, base_encoder.fc.in_features, mlp_dim, dim)

    def forward(self, x1, x2):
        """Two views [B, 3, H, W] -> their projections [B, D] each, not normalized.

        One pass per view, as in the authors' code: each view is normalized by its own batch statistics.
        """
        return self.base_encoder(x1), self.base_encoder(x2)


# Prefixes of torchvision's parameter names in checkpoints from other code, after `plain_names`. The first match is
# used, so that among several encoders in one file it is the trained one: momentum encoders and teachers are not here.
ENCODER_PREFIXES = (
    "base_encoder.",    # train.py, the authors' SogCLR, MoCo v3
    "encoder_q.",       # MoCo v1 and v2: the query encoder, not the key encoder
    "backbone.",        # Barlow Twins, VICReg, solo-learn and others with named parts
    "encoder.",         # SimSiam, Lightning modules
    "model.",           # Lightning modules around one torchvision model
    "",                 # lincls.py, torchvision
)
# Where files with more than weights store them: train.py and most others, torchvision's training scripts.
_WRAPPERS = ("state_dict", "model")


def encoder_state(checkpoint, source, arch=None):
    """Extract the encoder's tensors from a checkpoint of train.py or of those at `ENCODER_PREFIXES`, under
    torchvision's names, without `fc`.

    checkpoint: from `sogclr.checkpoint.load`; source: the flag and file, for the message; arch: the required one, if
    the checkpoint records it, None for any. Raises InputError if it differs, or there is no ResNet.
    """
    if arch and checkpoint.get("arch", arch) != arch:
        raise InputError(f"{source}: was made with --arch {checkpoint['arch']}, not {arch}")
    inside = checkpoint
    while key := next((key for key in _WRAPPERS if isinstance(inside.get(key), dict)), None):
        inside = inside[key]
    state = _tensors(inside)
    if len(state) < sum(isinstance(value, torch.Tensor) for value in inside.values()):
        raise InputError(f"{source}: has tensors whose names differ only in a wrapper's part, such as 'module.'; "
                         "save one of them alone")
    prefix = _prefix(state)
    if prefix is None:
        found = _some(checkpoint) if inside is checkpoint else f"{_some(checkpoint)}, with the tensors {_some(state)}"
        nests = [key for key, value in checkpoint.items()
                 if isinstance(value, dict) and _prefix(_tensors(value)) is not None]
        raise InputError(
            f"{source}: contains no ResNet encoder, no 'conv1.weight' under any name used by train.py, SogCLR, MoCo, "
            f"SimSiam, Lightning or torchvision; found {found}" + "".join(
                f"; to use {nest!r}, torch.save(torch.load(FILE, weights_only=True)[{nest!r}], NEW)" for nest in nests))
    state = {key.removeprefix(prefix): value for key, value in state.items()
             if key.startswith(prefix) and not key.startswith(prefix + "fc.")}
    for key, value in state.items():
        if not key.endswith("num_batches_tracked") and not (value.is_floating_point() and value.isfinite().all()):
            raise InputError(f"{source}: {prefix}{key} is not finite, or not of floating-point numbers "
                             f"({str(value.dtype).removeprefix('torch.')}), use another file")
    # Files from before torch 0.4.1 lack BatchNorm's counters, which are unused here.
    counters = {key.replace("running_mean", "num_batches_tracked") for key in state if key.endswith("running_mean")}
    return state | {key: torch.tensor(0) for key in counters - state.keys()}


def stem_of(state):
    """The stem of the ResNet that has the tensors of `encoder_state(...)`."""
    return "cifar" if state["conv1.weight"].shape[-1] == 3 else "imagenet"


def architecture(state, source):
    """The name and the stem of the ResNet that has the tensors of `encoder_state(...)`. Raises InputError if there is
    none.
    """
    stem = stem_of(state)
    shapes = {key: value.shape for key, value in state.items()}
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            model = resnet(arch, stem)
        if shapes == {key: value.shape for key, value in model.state_dict().items() if not key.startswith("fc.")}:
            return arch, stem
    raise InputError(f"{source}: its {len(state)} tensors match none of torchvision's ResNets "
                     f"({', '.join(ARCHITECTURES)})")


def load_encoder(model, state, source):
    """Load `encoder_state(...)` into a torchvision ResNet, leaving its classifier `fc` unchanged.

    Raises InputError, with torch's message on the first tensors, if the architectures differ.
    """
    head = {key: value for key, value in model.state_dict().items() if key.startswith("fc.")}
    try:
        model.load_state_dict(state | head)
    except RuntimeError as error:
        raise InputError(f"{source}: does not match this encoder, pass its --arch: {one_line(error)}") from error


def _tensors(state):
    """The tensors in a state dict, under names without torch's wrappers."""
    return plain_names({str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)})


def _prefix(state):
    """The first of the `ENCODER_PREFIXES` under which a state dict has an encoder, None if under none."""
    return next((prefix for prefix in ENCODER_PREFIXES
                 if prefix + "conv1.weight" in state and state[prefix + "conv1.weight"].ndim == 4), None)


def _some(names):
    """The first five names, as text."""
    return ", ".join(list(map(str, names))[:5]) + ", ..." * (len(names) > 5) or "nothing"

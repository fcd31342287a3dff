"""Models of transformers that people would pick instead, with random weights and Cityscapes' 19 classes.

Each runs as its documentation shows it: the model's forward, then its image processor's
`post_process_semantic_segmentation` to the size of the image. Numbers of the architectures are those of
    mask2former-swin-b, -l   Mask2Former's configurations maskformer2_swin_base_IN21k_384_bs16_90k and _large_ of
                             cityscapes/semantic-segmentation (facebook/mask2former-swin-*-cityscapes-semantic)
    eomt-l, -b               tue-mps/cityscapes_semantic_eomt_large_1024; B: ViT-B, three mask blocks, arXiv 2503.19108
    segformer-b5             nvidia/segformer-b5-finetuned-cityscapes-1024-1024
"""

from collections.abc import Callable
from unittest import mock

import torch
from measure import Work
from torch import Tensor
from transformers import (
    EomtConfig,
    EomtForUniversalSegmentation,
    EomtImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    SwinConfig,
)
from transformers.models.eomt import modeling_eomt
from transformers.models.mask2former import modeling_mask2former

RIVALS = ("mask2former-swin-b", "mask2former-swin-l", "eomt-b", "eomt-l", "segformer-b5")
CLASSES = {index: f"class {index}" for index in range(19)}


def build_rival(name: str, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Work:
    """One of `RIVALS` at an image size."""
    if name == "mask2former-swin-b":
        return mask2former(128, [4, 8, 16, 32], size, dtype, device)
    if name == "mask2former-swin-l":
        return mask2former(192, [6, 12, 24, 48], size, dtype, device)
    if name == "eomt-b":
        return eomt(768, 12, 12, 3, size, dtype, device)
    if name == "eomt-l":
        return eomt(1024, 24, 16, 4, size, dtype, device)
    return segformer(size, dtype, device)


def random_images(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable[[int], Tensor]:
    """Number of a call -> pixel_values (1, 3, H, W)."""
    return lambda number: torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(number)).to(device, dtype)


def mask2former(width: int, heads: list[int], size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Work:
    """Mask2Former on a Swin whose first stage has this width; heads of each stage."""
    swin = SwinConfig(
        image_size=384, embed_dim=width, depths=[2, 2, 18, 2], num_heads=heads, window_size=12, drop_path_rate=0.3,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, encoder_layers=6, decoder_layers=10, encoder_feedforward_dim=1024, dim_feedforward=2048,
        num_queries=100, id2label=CLASSES,
    )  # fmt: skip
    # Its loss, which inference never calls, asks for scipy.
    with mock.patch.object(modeling_mask2former, "requires_backends"):
        model = Mask2FormerForUniversalSegmentation(config)
    model.eval().requires_grad_(False).to(device, dtype)
    processor = Mask2FormerImageProcessor()

    @torch.inference_mode()
    def call(image: Tensor) -> Tensor:
        return processor.post_process_semantic_segmentation(model(pixel_values=image), target_sizes=[size])[0]

    return Work(call, random_images(size, dtype, device), dtype)


def eomt(
    width: int,
    layers: int,
    heads: int,
    mask_blocks: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Work:
    """EoMT for semantic segmentation: square windows along the longer side, as its image processor lays them."""
    side = min(size)
    config = EomtConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_blocks=mask_blocks, image_size=side,
        patch_size=16, num_queries=100, num_register_tokens=4, num_upscale_blocks=2, layerscale_value=1e-5,
        id2label=CLASSES,
    )  # fmt: skip
    # Its loss, which inference never calls, asks for scipy.
    with mock.patch.object(modeling_eomt, "requires_backends"):
        model = EomtForUniversalSegmentation(config)
    model.attn_mask_probs.zero_()  # as trained weights have it: masked attention is annealed away, and costs nothing
    model.eval().requires_grad_(False).to(device, dtype)
    processor = EomtImageProcessor(size={"shortest_edge": side, "longest_edge": None}, do_split_image=True)
    offsets = processor(torch.zeros(3, *size, dtype=torch.uint8), return_tensors="pt").patch_offsets
    images = random_images(size, dtype, device)

    def windows(number: int) -> Tensor:
        image = images(number)[0]
        along = 1 if size[0] > size[1] else 2
        return torch.stack([image.narrow(along, start, end - start) for _, start, end in map(Tensor.tolist, offsets)])

    @torch.inference_mode()
    def call(pixel_values: Tensor) -> Tensor:
        outputs = model(pixel_values=pixel_values, patch_offsets=offsets)
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]

    return Work(
        call,
        windows,
        dtype,
        notes=f"windows of {side}: {len(offsets)}; masked attention annealed away, as in trained weights",
    )


def segformer(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Work:
    """SegFormer-B5."""
    config = SegformerConfig(
        depths=[3, 6, 40, 3], hidden_sizes=[64, 128, 320, 512], num_attention_heads=[1, 2, 5, 8],
        sr_ratios=[8, 4, 2, 1], mlp_ratios=[4, 4, 4, 4], decoder_hidden_size=768, id2label=CLASSES,
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config).eval().requires_grad_(False).to(device, dtype)
    processor = SegformerImageProcessor()

    @torch.inference_mode()
    def call(image: Tensor) -> Tensor:
        return processor.post_process_semantic_segmentation(model(pixel_values=image), target_sizes=[size])[0]

    return Work(call, random_images(size, dtype, device), dtype)

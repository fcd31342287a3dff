"""Models of transformers that people would pick instead, with random weights and Cityscapes' 19 classes.

Each runs as its documentation shows: forward, then `post_process_semantic_segmentation` to the size of the image.
Architectures:
    mask2former-swin-b, -l   maskformer2_swin_base_IN21k_384_bs16_90k and _large_ of Mask2Former's configurations
                             (facebook/mask2former-swin-*-cityscapes-semantic)
    eomt-l, -b               tue-mps/cityscapes_semantic_eomt_large_1024; B: ViT-B, three mask blocks, arXiv 2503.19108
    segformer-b5             nvidia/segformer-b5-finetuned-cityscapes-1024-1024
"""

from unittest import mock

import torch
import transformers as hf
from measure import Work, random_images
from torch import Tensor, nn

# Width and heads of Swin's stages; width, layers, heads and mask blocks of EoMT.
SWINS = {"mask2former-swin-b": (128, [4, 8, 16, 32]), "mask2former-swin-l": (192, [6, 12, 24, 48])}
EOMTS = {"eomt-b": (768, 12, 12, 3), "eomt-l": (1024, 24, 16, 4)}
OTHER_MODELS = (*SWINS, *EOMTS, "segformer-b5")
CLASSES = {index: f"class {index}" for index in range(19)}


# The losses, which inference never calls, ask for scipy.
@mock.patch("transformers.models.mask2former.modeling_mask2former.requires_backends", lambda *_: None)
@mock.patch("transformers.models.eomt.modeling_eomt.requires_backends", lambda *_: None)
def build_other(name: str, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Work:
    """One of `OTHER_MODELS` at an image size; EoMT reads square windows, as its image processor splits images."""
    side, notes, offsets, more = min(size), "", None, {}
    if name in SWINS:
        model, processor = mask2former(*SWINS[name]), hf.Mask2FormerImageProcessor()
    elif name in EOMTS:
        model = eomt(*EOMTS[name], side)
        processor = hf.EomtImageProcessor(size={"shortest_edge": side, "longest_edge": None}, do_split_image=True)
        offsets = processor(torch.zeros(3, *size, dtype=torch.uint8), return_tensors="pt").patch_offsets
        more = {"patch_offsets": offsets}
        notes = f"windows of {side}: {len(offsets)}; masked attention annealed away, as in trained weights"
    else:
        model, processor = segformer(), hf.SegformerImageProcessor()
    model.eval().requires_grad_(False).to(device, dtype)

    def inputs(number: int) -> Tensor:
        images = random_images(number, 1, size, device).to(dtype)
        if offsets is None:
            return images
        along = 1 if size[0] > size[1] else 2
        return torch.stack(
            [images[0].narrow(along, start, end - start) for _, start, end in map(Tensor.tolist, offsets)]
        )

    @torch.inference_mode()
    def call(pixel_values: Tensor) -> Tensor:
        outputs = model(pixel_values=pixel_values, **more)
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]

    return Work(call, inputs, dtype, notes=notes)


def mask2former(width: int, heads: list[int]) -> nn.Module:
    """Mask2Former on Swin."""
    swin = hf.SwinConfig(
        image_size=384, embed_dim=width, depths=[2, 2, 18, 2], num_heads=heads, window_size=12, drop_path_rate=0.3,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return hf.Mask2FormerForUniversalSegmentation(hf.Mask2FormerConfig(
        backbone_config=swin, encoder_layers=6, decoder_layers=10, encoder_feedforward_dim=1024, dim_feedforward=2048,
        num_queries=100, id2label=CLASSES,
    ))  # fmt: skip


def eomt(width: int, layers: int, heads: int, mask_blocks: int, side: int) -> nn.Module:
    """EoMT for windows of side x side."""
    model = hf.EomtForUniversalSegmentation(hf.EomtConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_blocks=mask_blocks, image_size=side,
        patch_size=16, num_queries=100, num_register_tokens=4, num_upscale_blocks=2, layerscale_value=1e-5,
        id2label=CLASSES,
    ))  # fmt: skip
    model.attn_mask_probs.zero_()  # as in trained weights: masked attention is annealed away, and costs nothing
    return model


def segformer() -> nn.Module:
    """SegFormer-B5."""
    return hf.SegformerForSemanticSegmentation(hf.SegformerConfig(
        depths=[3, 6, 40, 3], hidden_sizes=[64, 128, 320, 512], num_attention_heads=[1, 2, 5, 8],
        sr_ratios=[8, 4, 2, 1], mlp_ratios=[4, 4, 4, 4], decoder_hidden_size=768, id2label=CLASSES,
    ))  # fmt: skip

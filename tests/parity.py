"""How close this model is to the published implementation, quantity by quantity.

    python tests/parity.py                     # the packs in tests/packs
    python tests/parity.py PATH/TO/mini_clip   # any pack of the same form

A pack holds a small random model under the published key names and what the published code (ByeongHyunPak/tqdm, commit
75168af, float32 on CPU) computed with it. `make_packs.py` made the ones in tests/packs. Prints one row per quantity and
exits with 1 if any is outside its tolerance.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tqdm_seg.configuration_tqdm import TqdmConfig
from tqdm_seg.decoder_tqdm import cell_centres, sine_positions
from tqdm_seg.deploy.convert import convert_published
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation, semantic_scores
from tqdm_seg.training.teacher import Teacher

PACKS = Path(__file__).parent / "packs"
FEATURE, LOGIT = 1e-4, 5e-4  # largest absolute difference
LOSS, GRADIENT = 1e-5, 1e-3  # relative: to the value, to the largest entry of the gradient


@dataclass
class Row:
    """One compared quantity; the tolerance bounds `relative` for losses and gradients, `absolute` for the rest."""

    name: str
    absolute: float
    relative: float
    tolerance: float
    is_relative: bool

    @property
    def passed(self) -> bool:
        """True within the tolerance (a NaN is outside)."""
        return (self.relative if self.is_relative else self.absolute) <= self.tolerance


def pack_config(pack: dict, **overrides) -> TqdmConfig:
    """The configuration of a pack's model, stochastic parts off."""
    eva = pack["arch"] == "eva"
    side = pack["image_size"] // pack["patch_size"]
    vision = {
        "tower": "eva02" if eva else "clip", "image_size": side * pack["patch_size"],
        "patch_size": pack["patch_size"], "hidden_size": pack["vision_width"],
        "intermediate_size": int(pack["vision_width"] * pack.get("vision_mlp_ratio", 4)),
        "num_hidden_layers": pack["vision_layers"], "num_attention_heads": pack["vision_heads"],
        "feature_layers": pack["vision_out_indices"], "projection_dim": pack["embed_dim"], "drop_path_rate": 0,
        "layer_norm_eps": 1e-6 if eva else 1e-5, "patch_remainder": "stretch",
    }  # fmt: skip
    text = {
        "hidden_act": "gelu" if eva else "quick_gelu", "hidden_size": pack["text_width"],
        "intermediate_size": 4 * pack["text_width"], "num_hidden_layers": pack["text_layers"],
        "num_attention_heads": pack["text_heads"], "projection_dim": pack["embed_dim"],
        "max_position_embeddings": pack["text_context_length"], "num_prompt_tokens": pack["prompt_num"],
    }  # fmt: skip
    fields = {
        "vision_config": vision, "text_config": text, "id2label": dict(enumerate(pack["class_names"])),
        "hidden_size": pack["feat_channels"], "group_norm_groups": pack["group_norm_groups"],
        "context_decoder_hidden_size": pack["context_decoder_width"],
        "context_decoder_heads": pack["context_decoder_heads"],
        "context_decoder_layers": pack["context_decoder_layers"], "context_decoder_dropout": 0,
        "pixel_decoder_layers": pack["pixel_decoder_layers"], "pixel_decoder_heads": pack["pixel_decoder_heads"],
        "pixel_decoder_points": pack["pixel_decoder_points"], "pixel_decoder_ffn_dim": pack["pixel_decoder_ffn"],
        "mask_decoder_layers": pack["decoder_layers"], "mask_decoder_heads": pack["decoder_heads"],
        "mask_decoder_ffn_dim": pack["decoder_ffn"], "num_points": pack["loss_num_points"],
        "score_map_temperature": pack["tau"], "no_object_weight": pack["no_object_weight"],
        "score_map_loss_over": "all", "window_size": pack["slide_crop"],
        "window_stride": pack.get("slide_stride", pack["slide_crop"]),
    }  # fmt: skip
    return TqdmConfig(**(fields | overrides))


class Pack:
    """A pack on disk: configuration, golden tensors, losses, and the published weights under their own names."""

    def __init__(self, folder: Path):
        self.name = folder.name
        self.pack = json.loads((folder / "config.json").read_text())
        self.golden_values = json.loads((folder / "golden.json").read_text())
        self.golden = load_file(folder / "golden.safetensors")
        self.strides = {}
        with safe_open(folder / "golden.safetensors", "pt") as file:
            self.strides = json.loads((file.metadata() or {}).get("strides", "{}"))
        self.state = load_file(folder / "weights.safetensors")
        if (rows := self.state.pop("token_rows", None)) is not None:  # only the rows of used tokens were kept
            table = self.state["text_encoder.token_embedding.weight"]
            full = torch.zeros(self.pack["vocab_size"], table.shape[1])
            full[rows] = table.float()
            self.state["text_encoder.token_embedding.weight"] = full

    def model(self, **overrides) -> TqdmForSemanticSegmentation:
        """The pack's model through the real converter, in eval mode."""
        model = TqdmForSemanticSegmentation(pack_config(self.pack, **overrides))
        model.load_state_dict(convert_published(self.state))
        return model.eval()

    def reference(self) -> dict[str, Tensor] | Teacher:
        """The frozen reference with the pack's own `reg_E0` weights, which differ from the backbone's."""
        state = dict(self.state)
        for key in self.state:
            if key.startswith("reg_E0."):
                state[key.replace("reg_E0.", "backbone.", 1)] = self.state[key]
        model = TqdmForSemanticSegmentation(pack_config(self.pack))
        model.load_state_dict(convert_published(state))
        return Teacher(model)

    @cached_property
    def destinations(self) -> dict[str, dict[str, Tensor]]:
        """For every published key, our parameters that it fills, with the published position of each of their entries.

        Every published tensor is filled with serial numbers and converted; where they arrive tells where they went.
        """
        serial = {
            key: torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape)  # exact below 2^24 entries
            for key, tensor in self.state.items()
            if not key.startswith("reg_E0.")
        }
        return {
            key: {name: index.long() for name, index in convert_published({key: numbers}).items()}
            for key, numbers in serial.items()
        }

    def labels(self, case: str) -> Tensor:
        """Label maps (B, H, W) of a training case."""
        return self.golden[f"{case}/gt_semantic_seg"][:, 0].long()

    def points(self, case: str) -> Tensor:
        """The points (L, M, P, 2) that the published sampler drew."""
        return torch.stack([self.golden[f"{case}/points_{i}"] for i in range(self.pack["decoder_layers"] + 1)])

    def thin(self, key: str, value: Tensor) -> Tensor:
        """The entries of `value` that the pack keeps of the golden tensor `key`."""
        return value.reshape(-1)[:: self.strides[key]] if key in self.strides else value

    def compare(self, key: str, value: Tensor, tolerance: float, is_relative: bool = False) -> Row:
        """A row for golden tensor `key`; relative differences are to its largest entry."""
        golden = self.golden[key].float()
        value = self.thin(key, value.detach().float())
        if value.numel() != golden.numel():
            raise ValueError(f"{key} has {golden.numel()} entries, ours {value.numel()}")
        difference = (value.reshape(golden.shape) - golden).abs()
        if self.golden[key].dtype == torch.float16:  # kept rounded: what lies within half a step is no difference
            difference = (difference - 2.0 ** (golden.abs().log2().floor() - 11)).clamp(min=0)
        absolute = difference.max().item()
        return Row(key, absolute, absolute / max(golden.abs().max().item(), 1e-12), tolerance, is_relative)


def trace(model: TqdmForSemanticSegmentation, image: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every intermediate that the packs name: (features, logits), from one forward pass through hooks."""
    core, features = model.model, {}
    handles = []

    def record(name, pick=lambda output: output):
        return lambda module, args, output: features.__setitem__(name, pick(output))

    for i, block in enumerate(core.vision_tower.blocks):
        handles.append(block.register_forward_hook(record(f"backbone_block_{i}")))
    handles.append(core.text_queries.context_decoder.register_forward_hook(record("context_decoder_out")))
    for i, layer in enumerate(core.pixel_decoder.layers):
        handles.append(layer.register_forward_hook(record(f"pd_layer_{i}")))
    for i, layer in enumerate(core.mask_decoder.layers):
        handles.append(layer.register_forward_hook(record(f"decoder_layer_{i}")))
        handles.append(
            layer.register_forward_pre_hook(
                lambda module, args, i=i: features.__setitem__(f"attn_mask_{i}", args[4][:, 0] != 0)
            )
        )
    vision = {}
    handles.append(core.vision_tower.register_forward_hook(lambda m, a, output: vision.update(out=output)))
    pixel = {}
    handles.append(core.pixel_decoder.register_forward_hook(lambda m, a, output: pixel.update(out=output)))
    handles.append(core.pixel_decoder.layers[0].register_forward_pre_hook(lambda m, args: pixel.update(first=args)))
    try:
        with torch.no_grad():
            outputs = model(image, use_windows=False, all_layers=True)
            features["text_embedding_raw"] = core.text_queries.encode()
    finally:
        for handle in handles:
            handle.remove()

    maps, tokens = vision["out"]
    for i, feature in enumerate(maps):
        features[f"backbone_feat_{i}"] = feature
    features["global_embedding"] = tokens[:, :1]
    features["visual_embedding"] = tokens[:, 1:].transpose(1, 2).unflatten(2, maps[2].shape[-2:])
    features["text_embedding"] = outputs.text_embeddings
    features["score_map"] = outputs.score_map
    pixels, positions, _, text, sizes = pixel["first"]
    features |= {"pd_encoder_input": pixels, "pd_query_pos": positions[0], "pd_text_key": text}
    features["pd_reference_points"] = cell_centres(sizes, pixels.device)
    features["pd_mask_features"], pyramid = pixel["out"]
    for i, level in enumerate(pyramid):
        features[f"pd_out_{i}"] = level
    logits = {"semantic": outputs.logits}
    logits["semantic_small"] = semantic_scores(outputs.class_logits[:, -1], outputs.mask_logits[:, -1])
    for i in range(outputs.class_logits.shape[1]):
        logits[f"cls_logits_{i}"] = outputs.class_logits[:, i]
        logits[f"mask_logits_{i}"] = outputs.mask_logits[:, i]
    return features, logits


def compare_inference(pack: Pack) -> list[Row]:
    """Sine positions, every intermediate and output of the eval cases, sliding windows, flip and scales."""
    model = pack.model()
    rows = []
    for key in pack.golden:
        if key.startswith("sine_position/"):
            h, w = map(int, key.split("/")[1].split("x"))
            ours = sine_positions(h, w, pack.pack["feat_channels"], torch.device("cpu"))
            rows.append(pack.compare(key, ours.transpose(1, 2).unflatten(2, (h, w)), FEATURE))
    for case in ("eval_native", "eval_rect"):
        if f"{case}/image" not in pack.golden:
            continue
        features, logits = trace(model, pack.golden[f"{case}/image"])
        for key in sorted(k for k in pack.golden if k.startswith(f"{case}/") and not k.endswith("/image")):
            name = key.split("/")[1]
            if name in logits:
                rows.append(pack.compare(key, logits[name], LOGIT))
            elif not name.startswith("attn_mask_"):
                rows.append(pack.compare(key, features[name], FEATURE))
            elif name in features:  # the last mask is never used, by nobody
                golden = pack.golden[key].bool()
                opened = golden & ~golden.all(-1, keepdim=True)  # stored before empty rows are opened
                rows.append(Row(key, float((opened != features[name]).sum()), 0.0, 0.0, False))
    rows += compare_scores(pack, model)
    model.prepare_for_inference()
    for row in compare_scores(pack, model):
        row.name += ", frozen and prepared"
        rows.append(row)
    return rows


def compare_scores(pack: Pack, model: TqdmForSemanticSegmentation) -> list[Row]:
    """What inference alone computes: scores of whole images, sliding windows, flip and scales."""
    rows = []
    for case in ("eval_native", "eval_rect"):
        if f"{case}/image" in pack.golden:
            with torch.inference_mode():
                rows.append(pack.compare(f"{case}/semantic", model.score(pack.golden[f"{case}/image"]), LOGIT))
    if "slide/image" in pack.golden:
        image = pack.golden["slide/image"]
        rows.append(pack.compare("slide/logits", model.segment(image), LOGIT))
        size = (image.shape[-2] + 20, image.shape[-1] - 30)
        rows.append(pack.compare("slide/logits_rescaled_half", model.segment(image, size), LOGIT))
    if "aug/pred" in pack.golden:
        views = [pack.golden[f"aug/image_scale_{i}"] for i in (0, 1)]
        mean = model.segment(views, tuple(pack.pack["aug_size"]), flip=True, softmax_views=True)
        rows.append(pack.compare("aug/softmax_mean", mean, LOGIT))
        rows.append(pack.compare("aug/pred", mean[0].argmax(0), 0.0))
    return rows


def published_name(term: str) -> str:
    """Our name of a loss term -> the published one."""
    singles = {
        "loss_textual": "reg.textual.loss",
        "loss_visual": "reg.visual.loss",
        "loss_score_map": "scr_map.loss_seg",
    }
    if term in singles:
        return singles[term]
    kind, _, layer = term.removeprefix("loss_").partition("_")
    kind = "cls" if kind == "class" else kind
    return f"decode.d{layer}.loss_{kind}" if layer else f"decode.loss_{kind}"


def training_step(pack: Pack, case: str, batch_statistics: bool) -> tuple[TqdmForSemanticSegmentation, dict, dict]:
    """Model after backward, losses by name, and outputs, with the published points; dropout and drop-path are 0."""
    model = pack.model().train(batch_statistics)
    image, labels = pack.golden["train/image"], pack.labels(case)
    outputs = model.model(image)
    if any(key.startswith("reg_E0.") for key in pack.state):
        reference = pack.reference()(image)
    else:
        reference = {
            "reference_image_embedding": pack.golden["train/reg_E0_global_embedding"][:, 0],
            "reference_text_embedding": model.model.text_queries.encode_reference(),
        }
    terms = model.compute_losses(outputs, labels, points=pack.points(case), **reference)
    sum(terms.values()).backward()
    return model, terms, {**outputs, **reference}


def compare_training(pack: Pack) -> list[Row]:
    """Loss terms and total, gradients, gradient norms, parameters without gradient, BatchNorm buffers after a step."""
    rows = []
    for case in ("train", "train_empty"):
        for batch_statistics in (True, False):
            kind = "bn_train" if batch_statistics else "bn_eval"
            values = pack.golden_values["training"][case]
            model, terms, outputs = training_step(pack, case, batch_statistics)
            ours = {published_name(term): value.item() for term, value in terms.items()}
            golden = {k: v for k, v in values[f"losses_{kind}"].items() if k != "scr_map.acc_seg"}
            if ours.keys() != golden.keys():
                raise ValueError(f"loss terms differ: {sorted(ours.keys() ^ golden.keys())}")
            pairs = {name: (ours[name], golden[name]) for name in golden}
            pairs["total"] = (sum(ours.values()), values[f"total_{kind}"])
            rows += [
                Row(f"{case}/{kind}/{name}", abs(a - b), abs(a - b) / abs(b), LOSS, True)
                for name, (a, b) in pairs.items()
            ]
            norms = values["grad_l2_norm" if batch_statistics else "grad_l2_norm_bn_eval"]
            rows += compare_norms(pack, model, norms, f"{case}/{kind}")
            if case == "train" and batch_statistics:
                rows += compare_step(pack, model, outputs)
    return rows


def published_gradients(pack: Pack, model: TqdmForSemanticSegmentation) -> dict[str, Tensor | None]:
    """Our gradients under the published names, None where there is none."""
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients: dict[str, Tensor | None] = {}
    for key, parts in pack.destinations.items():
        if not parts or any(ours.get(name) is None for name in parts):
            gradients[key] = None
            continue
        gradient = torch.zeros(pack.state[key].numel())
        for name, index in parts.items():
            gradient[index.flatten()] = ours[name].flatten()
        gradients[key] = gradient.view(pack.state[key].shape)
    return gradients


def compare_norms(pack: Pack, model: TqdmForSemanticSegmentation, norms: dict, case: str) -> list[Row]:
    """The worst difference of gradient norms, and how many parameters have a gradient on one side only."""
    ours = published_gradients(pack, model)
    norms = {key: norm for key, norm in norms.items() if not key.startswith("reg_E0.")}
    one_sided = sum((ours[key] is None) != (norm is None) for key, norm in norms.items())
    both = [key for key, norm in norms.items() if norm is not None and ours[key] is not None]
    if model.training:  # zero before a BatchNorm on batch statistics; what is stored is rounding noise
        both.remove("backbone.fpn1.0.bias")
    absolute = {key: abs(ours[key].norm().item() - norms[key]) for key in both}
    relative = max(absolute[key] / norms[key] for key in both)
    return [
        Row(f"{case}/norms of {len(both)} gradients", max(absolute.values()), relative, GRADIENT, True),
        Row(f"{case}/gradients on one side only", float(one_sided), 0.0, 0.0, False),
    ]


def compare_step(pack: Pack, model: TqdmForSemanticSegmentation, outputs: dict) -> list[Row]:
    """What the packs keep of the training forward and backward on batch statistics."""
    rows = [pack.compare("train/text_embedding", outputs["text_embeddings"], FEATURE)]
    rows.append(pack.compare("train/reg_T0", outputs["reference_text_embedding"], FEATURE))
    rows.append(pack.compare("train/reg_E0_global_embedding", outputs["reference_image_embedding"], FEATURE))
    for i in range(pack.pack["decoder_layers"] + 1):
        rows.append(pack.compare(f"train/cls_logits_{i}", outputs["class_logits"][:, i], LOGIT))
        rows.append(pack.compare(f"train/mask_logits_{i}", outputs["mask_logits"][:, i], LOGIT))
    gradients = published_gradients(pack, model)
    for key in sorted(k for k in pack.golden if k.startswith("train/grad/")):
        rows.append(pack.compare(key, gradients[key.removeprefix("train/grad/")], GRADIENT, is_relative=True))
    batch_norm = model.model.vision_tower.pyramid.up4[1]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        rows.append(pack.compare(f"train/bn_after/backbone.fpn1.1.{name}", getattr(batch_norm, name), FEATURE))
    return rows


def compare_pack(folder: Path) -> list[Row]:
    """All rows of one pack."""
    pack = Pack(folder)
    return compare_inference(pack) + compare_training(pack)


def summarise(rows: list[Row]) -> list[Row]:
    """Rows that differ only in a number (layers, blocks) become one, with their worst values."""
    groups = defaultdict(list)
    for row in rows:
        name = "train/grad/*" if row.name.startswith("train/grad/") else re.sub(r"(?<=[_d])\d+(?![\dx])", "*", row.name)
        groups[name].append(row)
    return [
        Row(
            f"{name} ({len(group)})" if len(group) > 1 else name,
            max(row.absolute for row in group),
            max(row.relative for row in group),
            group[0].tolerance,
            group[0].is_relative,
        )
        for name, group in groups.items()
    ]


def main() -> None:
    """Prints a table per pack; exit status 1 if a row is outside its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "packs", nargs="*", type=Path, default=sorted(filter(Path.is_dir, PACKS.iterdir())), help="pack folders"
    )
    parser.add_argument("--all-rows", action="store_true", help="one row per quantity instead of per kind")
    args = parser.parse_args()
    failed = 0
    for folder in args.packs:
        rows = compare_pack(folder)
        failed += sum(not row.passed for row in rows)
        print(f"\n{folder.name}: {len(rows)} quantities, torch {torch.__version__}, float32 on CPU\n")
        print(f"| {'quantity':44} | largest absolute | largest relative | tolerance      |  |")
        print(f"| {'-' * 44} | ---------------- | ---------------- | -------------- |--|")
        for row in rows if args.all_rows else summarise(rows):
            bound = f"{row.tolerance:.0e} {'relative' if row.is_relative else 'absolute'}" if row.tolerance else "0"
            mark = "ok" if row.passed else "FAILED"
            print(f"| {row.name:44} | {row.absolute:16.2e} | {row.relative:16.2e} | {bound:14} | {mark} |")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

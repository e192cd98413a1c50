"""Queries, encoder and decoder."""

import math

from ddetr_d2.layers import sine_embedding
from ddetr_d2.modeling.deformable_layers import DeformableDecoderLayer, DeformableEncoderLayer
from ddetr_d2.modeling.feature_levels import FeatureLevels
from ddetr_d2.modeling.heads import DetectionHead
from ddetr_d2.modeling.queries import EncoderProposals, LearnedQueries
from ddetr_d2.modeling.transformer import Decoder, Encoder, Transformer, TransformerSize

import pytest
import torch

SIZE = TransformerSize(hidden_dim=32, num_heads=4, dim_feedforward=64, dropout=0.1)


def make_levels(shapes, valid, seed=0):
    """One image whose ``valid`` (H, W) of each level holds fixed content, the rest noise."""
    tokens, positions, masks, sizes = [], [], [], []
    for level, ((height, width), (rows, columns)) in enumerate(zip(shapes, valid, strict=True)):
        generator = torch.Generator().manual_seed(seed + level)
        content = torch.randn(2, rows, columns, 32, generator=generator)
        maps = torch.randn(2, height, width, 32)
        maps[:, :rows, :columns] = content
        mask = torch.ones(height, width, dtype=torch.bool)
        mask[:rows, :columns] = False
        tokens.append(maps[0].flatten(0, 1))
        positions.append(maps[1].flatten(0, 1))
        masks.append(mask.flatten())
        sizes.append([float(columns), float(rows)])
    return FeatureLevels(
        tokens=torch.cat(tokens)[None],
        position=torch.cat(positions)[None],
        padding_mask=torch.cat(masks)[None],
        spatial_shapes=tuple(shapes),
        level_start_index=(0, shapes[0][0] * shapes[0][1]),
        valid_sizes=torch.tensor([sizes]),
    )


def make_transformer(queries, num_heads):
    heads = [DetectionHead(32, 3) for _ in range(num_heads)]
    for head in heads:  # boxes that move, so that refinement has something to refine
        torch.nn.init.normal_(head.bbox_embed[-2].weight, std=0.1)
    return Transformer(
        Encoder([DeformableEncoderLayer(SIZE, 2, 2) for _ in range(2)]),
        queries,
        Decoder([DeformableDecoderLayer(SIZE, 2, 2) for _ in range(3)], heads),
    ).eval()


def two_stage_queries():
    return EncoderProposals(5, 32, DetectionHead(32, 3))


@pytest.mark.parametrize("two_stage", [False, True])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_padding_changes_nothing(two_stage, num_heads):
    torch.manual_seed(0)
    queries = two_stage_queries() if two_stage else LearnedQueries(5, 32)
    transformer = make_transformer(queries, num_heads)
    valid = [(6, 8), (3, 4)]
    with torch.no_grad():
        plain, _ = transformer(make_levels(valid, valid))
        padded, _ = transformer(make_levels([(8, 14), (4, 7)], valid))
    for a, b in zip(plain, padded, strict=True):
        torch.testing.assert_close(a.boxes, b.boxes, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-5)


def test_refinement_passes_no_gradient_through_references():
    torch.manual_seed(0)
    transformer = make_transformer(LearnedQueries(5, 32), 3)
    layers, _ = transformer(make_levels([(4, 4), (2, 2)], [(4, 4), (2, 2)]))
    layers[-1].boxes.sum().backward()
    heads = transformer.decoder.heads
    assert heads[2].bbox_embed[0].weight.grad.abs().sum() > 0
    assert heads[1].bbox_embed[0].weight.grad is None
    assert heads[0].bbox_embed[0].weight.grad is None


def test_without_refinement_all_layers_start_from_the_queries():
    transformer = make_transformer(LearnedQueries(5, 32), 1)
    for head in transformer.decoder.heads:
        torch.nn.init.zeros_(head.bbox_embed[-2].weight)
    layers, _ = transformer(make_levels([(4, 4), (2, 2)], [(4, 4), (2, 2)]))
    queries = transformer.queries(torch.zeros(1, 20, 32), None)
    for layer in layers:
        torch.testing.assert_close(layer.boxes[..., :2], queries.reference)


def test_proposals_are_the_best_tokens_of_class_0():
    torch.manual_seed(0)
    queries = two_stage_queries()
    levels = make_levels([(6, 8), (3, 4)], [(5, 8), (3, 4)])
    memory = torch.randn(1, 60, 32)
    found = queries(memory, levels)
    assert found.proposals.logits.shape == (1, 60, 3)
    best = found.proposals.logits[0, :, 0].sort(descending=True).indices[:5]
    torch.testing.assert_close(found.reference[0], found.proposals.boxes[0, best])
    assert not found.reference.requires_grad
    # The box head starts from zero, so proposals are the anchors themselves.
    torch.testing.assert_close(
        found.proposals.boxes[0, 9], torch.tensor([1.5 / 8, 1.5 / 5, 0.05, 0.05])
    )
    torch.testing.assert_close(
        found.proposals.boxes[0, 48], torch.tensor([0.5 / 4, 0.5 / 3, 0.1, 0.1])
    )
    padding = found.proposals.boxes[0, 40:48]  # the sixth row is padding
    torch.testing.assert_close(padding, torch.ones_like(padding))


def test_fewer_tokens_than_queries():
    queries = EncoderProposals(50, 32, DetectionHead(32, 3))
    found = queries(torch.randn(1, 20, 32), make_levels([(4, 4), (2, 2)], [(4, 4), (2, 2)]))
    assert found.content.shape == (1, 20, 32)


def test_sine_embedding_of_a_box():
    box = torch.tensor([0.1, 0.2, 0.3, 0.4])
    embedding = sine_embedding(box, 16)
    assert embedding.shape == (64,)
    for coordinate in range(4):
        for i in range(8):
            angle = box[coordinate].item() * 2 * math.pi / 10000 ** (2 * i / 16)
            assert embedding[coordinate * 16 + 2 * i].item() == pytest.approx(
                math.sin(angle), abs=1e-5
            )
            assert embedding[coordinate * 16 + 2 * i + 1].item() == pytest.approx(
                math.cos(angle), abs=1e-5
            )

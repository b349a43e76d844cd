"""A small Faster R-CNN that trains from scratch, with GroupNorm, in minutes on a CPU."""

import detectron2.data.transforms as T
import torch
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from fvcore.common.param_scheduler import CosineParamScheduler

from pisa_d2.engine import clip_gradients

from ..common.coco import dataloader, lr_multiplier, optimizer, train
from ..common.models.faster_rcnn_fpn import model

_backbone, _rpn, _heads = model.backbone, model.proposal_generator, model.roi_heads
_backbone.bottom_up.stem.norm = _backbone.bottom_up.stages.norm = _backbone.norm = "GN"
_backbone.bottom_up.stages.depth = 18
_backbone.bottom_up.stages.pop("stride_in_1x1")  # only bottleneck blocks have it
_backbone.bottom_up.freeze_at = 0
_backbone.out_channels = _rpn.head.in_channels = 64
_rpn.anchor_generator.sizes = [[16], [32], [64], [128], [256]]
_rpn.pre_nms_topk = _rpn.post_nms_topk = (500, 300)
_heads.num_classes = 10
_heads.batch_size_per_image = 128
_heads.box_pooler.sampling_ratio = 2
_heads.box_head.update(
    input_shape=ShapeSpec(channels=64, height=7, width=7),
    conv_dims=[64, 64],  # with GroupNorm: plain layers do not learn ten classes in 400 steps
    conv_norm="GN",
    fc_dims=[256],
)
_heads.box_predictor.input_shape = ShapeSpec(channels=256)
model.pixel_mean, model.pixel_std = [127.5, 127.5, 127.5], [60.0, 60.0, 60.0]

train.update(output_dir="output/digits/lazy_faster_rcnn_R_18_FPN", init_checkpoint="", max_iter=400)
train.checkpointer.period = 200
optimizer.update(_target_=clip_gradients, optimizer=torch.optim.SGD, max_norm=10.0, lr=0.04)
lr_multiplier.scheduler = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
lr_multiplier.warmup_length = 20 / 400

dataloader.train.dataset.names = "digits_train"
dataloader.train.mapper.update(
    augmentations=[  # no flips: a mirrored digit is not a digit, or a different one
        L(T.ResizeShortestEdge)(short_edge_length=(192,), sample_style="choice", max_size=256)
    ],
    use_instance_mask=False,
)
dataloader.train.update(total_batch_size=4, num_workers=0)
dataloader.test.dataset.names = "digits_val"
dataloader.test.mapper.augmentations[0].update(short_edge_length=192, max_size=256)
dataloader.test.num_workers = 0

from pisa_d2 import PISACascadeROIHeads

from .cascade_mask_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads._target_ = PISACascadeROIHeads
train.output_dir = "output/coco/lazy_pisa_cascade_mask_rcnn_R_50_FPN_1x"

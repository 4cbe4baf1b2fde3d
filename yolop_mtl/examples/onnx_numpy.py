"""Boxes, drivable area and lanes of an image without torch; needs onnxruntime, numpy and pillow.

yolop-mtl export RUN --nms && python onnx_numpy.py RUN/model_nms.onnx street.jpg overlay.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw

model_file, image_file, overlay_file = sys.argv[1:]
session = onnxruntime.InferenceSession(model_file, providers=["CPUExecutionProvider"])
facts = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
height, width = facts["preprocessing"]["img_size"]

# Letterbox: scaled to fit, in the middle, grey around; then (1, 3, H, W) RGB, 0 to 1.
overlay = Image.open(image_file).convert("RGB")
scale = min(width / overlay.width, height / overlay.height)
inner = np.maximum(1, [round(overlay.width * scale), round(overlay.height * scale)])
corner = (np.array([width, height]) - inner) // 2
canvas = Image.new("RGB", (width, height), (facts["preprocessing"]["padding"],) * 3)
canvas.paste(overlay.resize(inner, Image.Resampling.BILINEAR), tuple(corner))
images = np.asarray(canvas, dtype=np.float32).transpose(2, 0, 1)[None] / 255
names = [output.name for output in session.get_outputs()]
found = dict(zip(names, (x[0] for x in session.run(names, {"images": images})), strict=True))

for name, colour in (("drivable", (0, 200, 0)), ("lane", (255, 0, 0))):
    if name in found:  # logits: the padding cut off, the best class or the sign, the image's size
        logits = found[name][:, corner[1] :, corner[0] :][:, : inner[1], : inner[0]]
        where = 110 * ((logits.argmax(0) if len(logits) > 1 else logits[0]) > 0)
        overlay.paste(colour, mask=Image.fromarray(where.astype(np.uint8)).resize(overlay.size))
for i in range(found.get("num_detections", 0)):
    points = (found["boxes"][i].reshape(2, 2) - corner) * overlay.size / inner
    label = f"{facts['class_names'][found['labels'][i]]} {found['scores'][i]:.3f}"
    ImageDraw.Draw(overlay).rectangle(points.flatten().tolist(), outline=(255, 220, 0), width=2)
    ImageDraw.Draw(overlay).text(points[0].tolist(), label)
    print(label, *points.flatten().round(2).tolist())
overlay.save(overlay_file)

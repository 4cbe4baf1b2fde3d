"""What every run with sub-centroids has: the plug-in and its hooks."""

custom_imports = dict(imports=["dnc.mmseg"], allow_failed_imports=False)
custom_hooks = [
    dict(type="CentroidHook"),
    dict(type="RandomStateHook"),
    dict(type="PlainCheckpointHook"),
]

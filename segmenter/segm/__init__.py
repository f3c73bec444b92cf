"""The module paths of the published code, so that its scripts run when `segm` in them is replaced by `segmenter.segm`.

    sed 's/\\bsegm\\b/segmenter.segm/g' segm/inference.py > inference.py

Each module passes on what this project has under the published name and signature; docs/drop-in.md lists all of them,
where they differ, and what is not there. As in the published code, `utils.torch.set_gpu_mode` and
`utils.distributed.init_process` change state of the whole process, when they are called and not before.
"""

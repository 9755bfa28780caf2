"""`wsae bench`: the trainer against every peer and against the machine's floor, alternating within one run.

The peers (eai-sparsify 1.3.3, dictionary-learning 0.1.0, sae-lens 6.54.12, overcomplete 0.3.0) bring about a hundred
and thirty packages, so give them a virtual environment of their own and name its interpreter:

    python3 -m venv peers
    peers/bin/pip install torch==2.13.0
    peers/bin/pip install eai-sparsify==1.3.3 dictionary-learning==0.1.0 sae-lens==6.54.12
    peers/bin/pip install overcomplete==0.3.0 schedulefree==1.4.1
    wsae bench --peers-python peers/bin/python

Install the same torch there as here: a ratio between two versions of torch says little (the run notes a difference).
Where torch is a CPU build and pip found a torchvision built for CUDA, transformers cannot be imported
("operator torchvision::nms does not exist"): `peers/bin/pip uninstall torchvision timm`; nothing here needs them.
"""

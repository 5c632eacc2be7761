"""What lies on disk and on servers: checkpoints and downloads."""

import os

MODELS_DIR = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models")

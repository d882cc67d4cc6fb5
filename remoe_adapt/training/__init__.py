"""Training a family: the trainer, its points, and runs that resume."""

from remoe_adapt.training.options import TrainOptions
from remoe_adapt.training.point import CHECKPOINT_MINUTES
from remoe_adapt.training.run import check_exact, held_out_documents, token_rows, train_family

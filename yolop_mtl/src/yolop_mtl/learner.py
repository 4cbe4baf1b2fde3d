"""Network and losses in one module, so that processes wait for each other once a step."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from shared_utils.errors import InputError
from yolop_mtl.loss_weights import LossWeights
from yolop_mtl.losses import Criterion
from yolop_mtl.model import YOLOPv2
from yolop_mtl.targets import Targets


class Learner(nn.Module):
    """What trains.

    Attributes:
        model: the network.
        weights: of the loss terms, perhaps learned.
    """

    def __init__(
        self,
        model: YOLOPv2,
        criterion: Criterion,
        weights: LossWeights,
        *,
        freeze: Sequence[str] = (),
    ) -> None:
        """Put them together.

        Args:
            model: the network.
            criterion: its loss terms.
            weights: of the terms.
            freeze: parts of the network that get no gradient and keep their statistics.

        Raises: InputError for a part that is not there, or where nothing is left to train.
        """
        super().__init__()
        self.model, self.criterion, self.weights = model, criterion, weights
        self.freeze = tuple(freeze)
        for name in self.freeze:
            part = getattr(model, name)
            if part is None:
                do = "leave it out, or name the task in model.tasks"
                raise InputError("optim.freeze", f"'{name}', which is off", "a part in use", do)
            part.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            do = "leave one out"
            raise InputError("optim.freeze", ", ".join(freeze), "a part that trains", do)

    def train(self, mode: bool = True) -> "Learner":
        """Training mode for all but the frozen parts."""
        super().train(mode)
        for name in self.freeze:
            getattr(self.model, name).eval()
        return self

    def forward(self, images: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, the mean over its images, and the terms it is the sum of.

        Args:
            images: (B, 3, H, W) uint8, RGB.
            targets: their truth, on the same device.
        """
        result: tuple[Tensor, dict[str, Tensor]]
        result = self.weights(self.criterion(self.model(scaled(images)), targets))
        return result


def scaled(images: Tensor) -> Tensor:
    """Bytes (B, 3, H, W) as the network takes them: float32, 0 to 1."""
    return images.float().div_(255)


def fitness(metrics: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted mean of the figures that there are; 0 where there is none with a weight."""
    present = {name: weight for name, weight in weights.items() if name in metrics}
    total = sum(present.values())
    return sum(metrics[n] * weight for n, weight in present.items()) / total if total else 0.0

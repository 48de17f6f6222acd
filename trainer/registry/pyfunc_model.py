"""The code of a registered version (models-from-code: MLflow stores and runs this file, nothing is pickled).
trainer/serving/recommend.py does the work."""

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from trainer.errors import RequestError

ANSWER = ["items", "scores", "model"]


class GenSRModel(PythonModel):
    """predict: one request a row (trainer/serving/recommend.py says how they look) → columns "items",
    "scores" and "model", one answer a row. params: settings for rows that have none of their own, such as
    {"k": 20}."""

    def load_context(self, context: PythonModelContext) -> None:
        from trainer.serving.recommend import Recommender

        self.recommender = Recommender.from_artifacts(Path(context.artifacts["model"]).parent)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        from trainer.serving.requests import is_absent

        rows = [
            {**(params or {}), **{name: value for name, value in row.items() if not is_absent(value)}}
            for row in model_input.to_dict("records")
        ]
        try:
            answers = self.recommender.answer(rows)
            return pd.DataFrame(answers, columns=ANSWER)  # named, so that a frame without rows has them, too
        except RequestError as error:
            # MLflow's server answers this one with 400 and the reason, anything else with a traceback
            raise MlflowException.invalid_parameter_value(str(error)) from error


set_model(GenSRModel())

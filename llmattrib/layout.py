"""Where the files of a run lie, below its directory. Joins names; reads and writes nothing."""

from llmattrib.methods import MethodName


class RunLayout:
    """The paths inside a run directory, which may be local or an fsspec URL."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir.rstrip("/")

    def path(self, *parts: str) -> str:
        """Join `parts` below the run directory."""
        return "/".join((self.run_dir, *parts))

    @property
    def config(self) -> str:
        """The resolved, replayable config."""
        return self.path("config.yaml")

    @property
    def adapter(self) -> str:
        """The PEFT adapter, when trained here."""
        return self.path("adapter")

    @property
    def examples(self) -> str:
        """The texts of the examples, row-aligned with the features."""
        return self.path("examples.parquet")

    @property
    def features(self) -> str:
        """The feature store."""
        return self.path("features.zarr")

    @property
    def curvature(self) -> str:
        """The curvature that features are whitened with."""
        return self.path("curvature.safetensors")

    @property
    def words(self) -> str:
        """The store of word gradients, where `tracin_we` is among the methods."""
        return self.path("words.zarr")

    @property
    def validation(self) -> str:
        """The features of the validation set of `values`."""
        return self.path("validation.zarr")

    def representers(self, method: str) -> str:
        """The representer store of `method`."""
        return self.path("representers", f"{MethodName.parse(method).file_name}.zarr")

    def index(self, method: str) -> str:
        """The faiss index of `method`."""
        return self.path("index", f"{MethodName.parse(method).file_name}.faiss")

    def index_manifest(self, method: str) -> str:
        """What the index of `method` was made from."""
        return self.path("index", f"{MethodName.parse(method).file_name}.json")

    def index_sample(self, method: str) -> str:
        """A sample of the representers of `method`, for the size of all values together."""
        return self.path("index", f"{MethodName.parse(method).file_name}.sample.npy")

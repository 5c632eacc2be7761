"""Continues prompts by the million, on all machines of a Ray cluster or on this one, with the project's own generate().

    pip install -r requirements-ray.txt
    python examples/generate_many.py prompts.jsonl out/ --n_tokens_to_generate 40

Ray Data reads the prompts as they are needed, hands them to workers, which load the model once, and gives what a worker
had that died to another. A part of the input is 8 batches of lines: one worker answers it, and this process writes it
to out/, whole or not at all, under a name that says where in the input it stood. So nothing is done twice or lost: what
out/ has, the same command leaves out. Read in the order of their names, the parts have the answers in the order of the
prompts.
"""

import codecs
import contextlib
import io
import itertools
import json
import logging
import os
import re
import socket
import sys
import warnings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from cli import start

    start("numpy", "regex", "tqdm")

import cli
from backends import devices
from files.bar import Bar
from files.lock import locked
from gpt2 import MODELS_DIR, generate, generate_ids
from sampling import check_options, is_number, is_whole
from utils import ModelError, load_encoder_hparams_and_params

try:
    import pyarrow as pa
    import ray
    from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem
    from ray.data.datasource import FileBasedDatasource
except ImportError as error:
    if not cli.asks_for_help(sys.argv):
        cli.fail(f"needs Ray Data: pip install -r requirements-ray.txt ({error})")
    FileBasedDatasource = object

N_BATCHES = 8  # in a part: enough to sort by length, and little to lose
SETTINGS = "settings.json"


class Parts(FileBasedDatasource):
    """The parts of files, a row each: {"name": the part's, "first": its first line, "data": bytes, "is_json"}.

    n_lines: how many lines a part has. done: {name: (how many answers it has, ...)} of parts to leave out, unless there
    should be more. files: (path, size) of each. What cannot be read is a last part with a "mistake".
    """

    def __init__(self, paths, n_lines):
        super().__init__(paths)
        self.n_lines, self.done = n_lines, {}
        self.files = list(zip(self._paths(), self._file_sizes(), strict=True))
        self.places = {path: i for i, (path, _) in enumerate(self.files)}

    def _read_stream(self, f, path):
        mistake = ""
        try:
            yield from self.parts(f, path)
        except (OSError, ValueError) as error:  # where it was packed, and is damaged
            mistake = f"{path} cannot be read: {cli.one_line(error)}"
        if mistake:
            yield part_table(mistake=mistake)

    def parts(self, f, path):
        lines, first = cli.bounded(io.BufferedReader(f)), 0
        is_json = re.search(r"\.jsonl(\.(gz|bz2|br|lz4|zst|snappy))?$", path, re.IGNORECASE) is not None
        while part := list(itertools.islice(lines, self.n_lines)):
            name = f"part-{self.places[path]:05}-{first:012}.jsonl"
            data = b"".join(part)
            if name not in self.done or self.done[name][0] != len(prompts_of(data, first, is_json)):
                yield part_table(name, first, data, is_json)
            first += len(part)


def part_table(name="", first=0, data=b"", is_json=False, mistake=""):
    row = {"name": name, "first": first, "data": data, "is_json": is_json, "mistake": mistake}
    return pa.Table.from_pylist([row])


def prompts_of(data, first, is_json):
    """An object for each prompt of a part, in their order: see cli.prompt_objects."""
    data = data if first else data.removeprefix(codecs.BOM_UTF8)  # some editors begin a file with it
    return [*cli.prompt_objects(io.BytesIO(data), is_json)]


class Worker:
    """Answers parts, as one actor of Ray Data's pool: {"name", "answers": bytes of JSON lines}.

    Where it cannot, and the user can mend that, it says why in {"mistake"}.
    """

    def __init__(self, model, arrays, stop_texts, batch_size, n_samples, seed, **options):
        self.batch_size, self.n_samples, self.seed, self.mistake = batch_size, n_samples, seed, ""
        try:
            encoder, hparams, params = load_encoder_hparams_and_params(*model)
            params = devices.place(params, *arrays)
        except (ModelError, devices.DeviceError) as error:
            self.mistake = cli.one_line(error)
        else:
            options |= {"params": params, "n_head": hparams["n_head"]}
            self.writer = cli.Writer(encoder, generate, generate_ids, stop_texts, **options)

    def __call__(self, part):
        self.mistake = part.pop("mistake", "") or self.mistake
        try:
            answers = [] if self.mistake else self.answers(**part)
        except (MemoryError, RuntimeError) as error:
            if not cli.is_out_of_memory(error):
                raise
            self.mistake = f"a worker has not enough memory, a smaller --batch_size needs less: {cli.one_line(error)}"
        # what is no Unicode, such as half of an emoji, becomes the \ud83d that it was in JSON
        text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers) if not self.mistake else ""
        return {"name": part["name"], "answers": text.encode("utf-8", "backslashreplace"), "mistake": self.mistake}

    def answers(self, name, first, data, is_json):
        """An object for each prompt of a part, in their order: see cli.Writer."""
        objects = prompts_of(data, first, is_json)
        numbers = [i for i, line in enumerate(io.BytesIO(data), first) if line.strip() or not is_json]  # of their lines
        for batch in cli.batches_by_length(objects, self.writer.encode, max(1, self.batch_size // self.n_samples)):
            prompts = [ids for _, ids in batch for _ in range(self.n_samples)]
            seeds = [self.row_seed(numbers[i], sample) for i, _ in batch for sample in range(self.n_samples)]
            cli.add_answers(objects, batch, self.writer.answers(prompts, seeds))
        return objects

    def row_seed(self, line, sample):
        """Follows from a prompt's place in its file alone, so that neither worker nor batch matters."""
        return self.seed if self.seed is None else (self.seed + line * self.n_samples + sample) % 2**63


def write(filesystem, path, data):
    """A file that is there whole or not at all, whenever this ends."""
    folder, _, name = path.rpartition("/")
    unfinished = f"{folder}/unfinished-{os.getpid()}-{name}"  # so that no part-* is half a part
    with filesystem.open_output_stream(unfinished) as f:
        f.write(data)
    if isinstance(filesystem, LocalFileSystem):
        with open(unfinished, "r+b") as f:
            os.fsync(f.fileno())  # so that not even a power cut can leave less under the final name
    filesystem.move(unfinished, path)


def tally(data):
    """(answers, answers that are an "error") of a part. Raises ValueError if it holds anything else."""
    objects = [json_object(line) for line in data.splitlines()]
    if not all({*cli.ANSWERS} & {*answer} for answer in objects):
        raise ValueError("it holds other than answers")
    return len(objects), sum("error" in answer for answer in objects)


def json_object(data):
    """Raises ValueError if it is none."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError("it holds other than objects")
    return value


def read(filesystem, path):
    with filesystem.open_input_stream(path) as f:
        return f.read()


@contextlib.contextmanager
def alone(filesystem, folder):
    """Keeps other processes on this machine from writing to a folder that is here. Ends with one line if one does."""
    with contextlib.ExitStack() as stack:
        if isinstance(filesystem, LocalFileSystem):
            with cli.mistakes(OSError, f"{folder} cannot be written: "):
                stack.enter_context(locked(folder, patient=False))
        yield


def begin_or_resume(filesystem, folder, settings):
    """What is done: {name of a part: its tally}. Ends with one line if it was done with other settings."""
    filesystem.create_dir(folder)
    files = {info.base_name: info.path for info in filesystem.get_file_info(FileSelector(folder))}
    files = {name: path for name, path in files.items() if not name.startswith("unfinished-") and name != ".lock"}
    if files and SETTINGS not in files:
        cli.fail(f"{folder} has files already, and no {SETTINGS} of a run to go on with: give another folder")
    done = {}
    for name, path in files.items():
        if re.fullmatch(r"part-\d+-\d+\.jsonl", name):
            with cli.mistakes(ValueError, f"{path} is damaged, delete it: "):
                done[name] = tally(read(filesystem, path))
    if done:
        refuse_others(filesystem, folder, settings)
    else:
        if SETTINGS in files:
            with cli.mistakes(ValueError, f"{files[SETTINGS]} is of no run: give another folder: "):
                check_ours(json_object(read(filesystem, files[SETTINGS])), settings)
        write(filesystem, f"{folder}/{SETTINGS}", json.dumps(settings, indent=1).encode())
    return done


def check_ours(saved, settings):
    """Raises ValueError unless the settings that a file has are those of a run, this or another."""
    if saved.keys() != settings.keys():
        raise ValueError("it has other settings")


def refuse_others(filesystem, folder, settings):
    """Ends with one line unless the run in a folder has these settings."""
    path = f"{folder}/{SETTINGS}"
    with cli.mistakes(ValueError, f"{path} is damaged, give another folder: "):
        saved = json_object(read(filesystem, path))
    for key, value in settings.items():
        if saved.get(key) != value:
            fault = "other files of prompts" if key == "files" else f"{key}={saved.get(key)!r:.80}, not {value!r:.80}"
            cli.fail(f"the run in {folder} has {fault}: give another folder, or the settings that it has")


def is_within(out, path):
    out, path = (place.rstrip("/") if "://" in place else os.path.realpath(place) for place in (out, path))
    sep = "/" if "://" in path else os.sep
    return f"{out}{sep}".startswith(f"{path}{sep}")


def room_for_workers(need):
    """How many workers the machines of the cluster have room for. need: {"CPU": of each, "GPU": of each}."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(min(has.get(key, 0) / n for key, n in need.items() if n)) for has in machines)


def silence_ray():
    """Has all that Ray prints, from Python and C++, go nowhere: its own log files have it. sys.stderr stays ours."""
    logging.disable()
    warnings.simplefilter("ignore")
    options = {"encoding": sys.stderr.encoding, "errors": "backslashreplace"}
    sys.stderr = open(os.dup(2), "w", buffering=1, **options)  # noqa: SIM115
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def main(
    *paths: str,
    model_size: str = "124M",
    models_dir: str = MODELS_DIR,
    n_tokens_to_generate: int = 40,
    temperature: float = 0,
    top_k: int = 0,
    top_p: float = 1,
    seed: int = None,
    repetition_penalty: float = 1,
    no_repeat_ngram: int = 0,
    n_samples: int = 1,
    stop: str = None,
    special: bool = False,
    sliding_window: bool = False,
    batch_size: int = 32,
    logprobs: int = None,
    backend: str = "numpy",
    dtype: str = "float32",
    num_workers: int = None,
    num_cpus: int = 1,
    num_gpus: float = None,
):
    """Continues files of prompts with GPT-2, on all machines of a Ray cluster or on this one.

    Runs on the cluster that RAY_ADDRESS names or this machine is a part of, else on this machine alone.

    Args:
        paths: files or folders of prompts, and last the folder for the answers, here or as Ray has them: s3://... In
            .jsonl files each line is an object with a "prompt", whose other fields the answer keeps; in others a prompt
        model_size: 124M, 355M, 774M or 1558M (downloaded on first use), or any folder in models_dir with a checkpoint
        models_dir: the folder that holds the models, on every machine
        n_tokens_to_generate: how many tokens to append
        temperature: 0 always takes the likeliest token; 1 draws from the model's probabilities; more is more random
        top_k: with a temperature, draw from the k likeliest tokens only (0: from all)
        top_p: with a temperature, draw from the smallest set of likeliest tokens whose probabilities reach p
        seed: with a temperature, makes the draws repeatable: sample j of line i of a file, both counted from 0, is what
            gpt2.py draws with seed + i * n_samples + j
        repetition_penalty: above 1, tokens that stand in the text already are less likely to come again
        no_repeat_ngram: no run of so many tokens comes twice
        n_samples: with a temperature, how many continuations to draw for each prompt, as its "samples"
        stop: end before this text appears; \\n is a line break; several are given as a list, "['User:', 'Bot:']"
        special: <|endoftext|> in a prompt is that token, and not a text like any other; --stop knows it in any case
        sliding_window: past the end of the model's context, go on with the newest half of it as the prompt
        batch_size: how many texts a worker makes at once
        logprobs: tell the log-probability of each token, and of the so many likeliest in its place
        backend: numpy, jax or cupy
        dtype: float32, or with JAX bfloat16
        num_workers: how many at most; all that there is room for unless given
        num_cpus: processor cores of each worker
        num_gpus: GPUs of each worker, or a part of one such as 0.5; 1 with jax and cupy where the cluster has GPUs
    """
    if len(paths) < 2:
        cli.fail("give files or folders of prompts, and last the folder for the answers (see --help)")
    *paths, out = paths
    paths = [path if "://" in path else os.path.abspath(path) for path in paths]
    for path in paths:
        if "://" not in path and not os.access(path, os.R_OK):
            cli.fail(f"{path} cannot be read: {'permission denied' if os.path.exists(path) else 'it is not there'}")
        if is_within(out, path):
            cli.fail(f"{out} is within {path}: its answers would be read as prompts: give a folder elsewhere")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "logprobs": logprobs}
    sampling |= {"repetition_penalty": repetition_penalty, "no_repeat_ngram": no_repeat_ngram}
    with cli.mistakes(ValueError):
        check_options(n_tokens_to_generate, n_samples, batch_size, **sampling)
        for name, value in {"num_workers": num_workers, "num_cpus": num_cpus}.items():
            if value is not None and (not is_whole(value) or value == 0):
                raise ValueError(f"{name} must be a whole number, 1 or more, not {value!r}")
        if num_gpus is not None and not (
            is_number(num_gpus) and num_gpus >= 0 and (num_gpus <= 1 or num_gpus % 1 == 0)
        ):
            raise ValueError(f"num_gpus must be a whole number or a part of 1, not {num_gpus!r}")
    cli.check_flags(None, False, paths, False, n_samples, None, None, None, seed, temperature)
    stop_texts, model, arrays = cli.stop_texts(stop), (model_size, os.path.abspath(models_dir)), (backend, dtype)
    if dtype not in devices.DTYPES.get(backend, ()):
        choices = "; ".join(f"{name} with {' or '.join(dtypes)}" for name, dtypes in devices.DTYPES.items())
        cli.fail(f"there is no backend {backend} with dtype {dtype}: choose {choices}")
    with cli.mistakes((ModelError, ValueError)):  # before any worker meets it, and fetched only once
        load_encoder_hparams_and_params(*model)

    host, colon, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    if colon and port.isdecimal() and "://" not in host:
        with cli.mistakes(OSError, f"the Ray cluster at {host}:{port} cannot be reached: "):
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray would try for minutes
    with cli.mistakes((OSError, pa.ArrowException), f"{out} cannot be written: "):
        filesystem, folder = FileSystem.from_uri(out if "://" in out else os.path.abspath(out))
    generation = {"n_tokens_to_generate": n_tokens_to_generate, "sliding_window": sliding_window, **sampling}
    generation |= {"n_samples": n_samples, "batch_size": batch_size, "special": special}
    worker = model, arrays, stop_texts
    with alone(filesystem, folder):
        answer_files(paths, filesystem, folder, worker, generation, num_workers, num_cpus, num_gpus)


def answer_files(paths, filesystem, folder, worker, generation, num_workers, num_cpus, num_gpus):
    """Starts Ray, and leaves in a folder the answers to files of prompts. worker, generation: what Worker takes."""
    silence_ray()
    with cli.mistakes(Exception, "Ray does not start: "):  # it raises nothing more exact where a machine is too busy
        ray.init(log_to_driver=False)
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    model, (backend, dtype), stop_texts = worker
    num_gpus = int(backend != "numpy" and has_gpus) if num_gpus is None else num_gpus
    room = room_for_workers({"CPU": num_cpus, "GPU": num_gpus})
    if not room:
        cli.fail(f"no machine of the cluster has {num_cpus} CPUs and {num_gpus} GPUs for a worker")

    with cli.mistakes((OSError, ValueError), "the prompts cannot be read: "):
        parts = Parts(paths, N_BATCHES * generation["batch_size"])
        if len(parts.places) < len(parts.files):
            raise ValueError("a file is given twice")
    settings = {"model_size": model[0], "models_dir": model[1], "backend": backend, "dtype": dtype, "stop": stop_texts}
    times = [os.path.getmtime(path) if os.path.exists(path) else None for path, _ in parts.files]  # of local files
    settings |= {**generation, "files": [[*file, time] for file, time in zip(parts.files, times, strict=True)]}
    with cli.mistakes((OSError, pa.ArrowException), f"{folder} cannot be written: "):
        parts.done = done = begin_or_resume(filesystem, folder, settings)

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # or Ray would put small parts together, for one worker
    # reading takes next to nothing: it waits for no CPU, and is done where the files are
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    ours = {"runtime_env": {"env_vars": worker_environment(1, 0)}}
    answers = ray.data.read_datasource(parts, num_cpus=0, concurrency=1, label_selector=here, ray_remote_args=ours).map(
        Worker,
        fn_constructor_args=worker,
        fn_constructor_kwargs=generation,
        compute=ray.data.ActorPoolStrategy(size=min(num_workers or room, room), max_tasks_in_flight_per_actor=1),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        runtime_env={"env_vars": worker_environment(num_cpus, num_gpus)},
    )
    n_done = sum(n for n, _ in done.values())
    with Bar(desc="prompts", initial=n_done) as bar:
        # Ray Data replaces workers and machines that are lost, as often as it takes
        for batch in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for part in batch.to_pylist():
                if part["mistake"]:
                    cli.fail(part["mistake"])
                name, n_before = part["name"], done.get(part["name"], (0, 0))[0]
                if name in done:
                    said = f"{name} had {n_before} answers, which were not all, and is answered anew"
                    Bar.write(cli.shown(said), sys.stderr)
                refuse_others(filesystem, folder, settings)  # of which some may have come, where none is kept out
                write(filesystem, f"{folder}/{name}", part["answers"])
                done[name] = tally(part["answers"])
                bar.update(done[name][0] - n_before)
    n_done, n_errors = map(sum, zip((0, 0), *done.values(), strict=True))
    if not n_done:
        cli.fail("there are no prompts in these files")
    if n_errors:
        cli.fail(f'{n_errors} of {n_done} prompts could not be continued: their lines in {folder} have an "error"')


def worker_environment(num_cpus, num_gpus):
    """Variables by which a worker finds our code, and keeps to the cores and the part of a GPU that it was given."""
    variables = {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(cli.__file__), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OPENBLAS_NUM_THREADS": num_cpus,
        "OMP_NUM_THREADS": num_cpus,
        "NPROC": num_cpus,
    }  # NPROC: of XLA
    if 0 < num_gpus < 1:
        variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = 0.9 * num_gpus  # JAX would take three quarters of all
    return {name: str(value) for name, value in variables.items()}


if __name__ == "__main__":
    cli.run(main, "generate_many.py: stopped; the same command goes on from here")

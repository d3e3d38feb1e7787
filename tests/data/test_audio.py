"""Reading audio: what is read is what was written, and each bad file gives its own error."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from s3distill.data.audio import AudioError, audio_info, check_audio, read_audio


def write(path: Path, num_samples: int = 8000, rate: int = 16000, channels: int = 1) -> np.ndarray:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (num_samples, channels))
    soundfile.write(path, samples, rate, subtype="PCM_16")
    return samples


@pytest.mark.parametrize("ending", ["flac", "wav"])
def test_reads_what_was_written(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    written = write(path)
    samples = read_audio(path)
    assert samples.dtype == np.float32 and samples.shape == (8000,)
    np.testing.assert_allclose(samples, written[:, 0], atol=1 / 32768)
    assert audio_info(path) == check_audio(path) == (16000, 1, 8000)


def test_expected_rate_is_an_argument(tmp_path):
    write(tmp_path / "a.wav", rate=8000)
    assert len(read_audio(tmp_path / "a.wav", expected_rate=8000)) == 8000


def bad_files(folder: Path) -> dict[str, Path]:
    files = {
        name: folder / f"{name}.flac" for name in ("missing", "zero", "text", "rate", "stereo", "empty", "truncated")
    }
    files["zero"].touch()
    files["text"].write_text("no audio in here")
    write(files["rate"], rate=22050)
    write(files["stereo"], channels=2)
    files["empty"] = folder / "empty.wav"
    write(files["empty"], num_samples=0)
    write(files["truncated"])
    data = files["truncated"].read_bytes()
    files["truncated"].write_bytes(data[: len(data) // 2])
    return files


MESSAGES = {
    "missing": "an audio file must exist, but there is none; correct the path or the root",
    "zero": "an audio file must hold audio, but it has 0 bytes; copy or convert it again",
    "text": "an audio file must be readable, but libsndfile says 'Format not recognised'; copy or convert it again",
    "rate": "the sample rate must be 16000 Hz, but it is 22050 Hz; convert it: sox 'rate.flac' -r 16000 -c 1",
    "stereo": "audio must be mono, but it has 2 channels; convert it: sox 'stereo.flac' -r 16000 -c 1",
    "empty": "an audio file must hold audio, but it has 0 samples; copy or convert it again",
    "truncated": "the file must hold the 8000 samples of its header, but ",
}


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("function", [read_audio, check_audio])
def test_each_bad_file_has_its_error(tmp_path, name, function):
    path = bad_files(tmp_path)[name]
    with pytest.raises(AudioError) as caught:
        function(path)
    assert str(caught.value).startswith(f"{path}: {MESSAGES[name]}")


def test_truncation_is_only_seen_at_the_end(tmp_path):
    path = bad_files(tmp_path)["truncated"]
    assert check_audio(path, check_end=False).num_samples == 8000


def test_an_audio_error_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="must exist"):
        audio_info(tmp_path / "no.flac")

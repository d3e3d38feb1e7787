"""espeak-ng through ctypes: speech comes out, the same each time, and bad input is refused."""

import sys

import numpy as np
import pytest

from s3distill.data import espeak, espeak_worker
from s3distill.data.espeak import synthesise

pytest.importorskip("espeakng_loader")


def test_speech_is_audible_and_as_long_as_it_should_be():
    samples, rate = synthesise("bring five golden monkeys outside")
    assert samples.dtype == np.float32 and samples.ndim == 1 and rate == 22050
    assert 1.5 < len(samples) / rate < 4
    assert 0.1 < np.abs(samples).max() <= 1


@pytest.mark.parametrize("voice", ["en-us+m1", "en-gb+f5", "en-us+adam"])  # plain, breathy and Klatt voices
def test_the_same_request_gives_the_same_samples_behind_another_one(voice):
    first, _ = synthesise("two red ships", voice, 150, 45, 40)
    synthesise("something else that is long enough to move every counter", "en-us+f2", 180, 60, 70)
    second, _ = synthesise("two red ships", voice, 150, 45, 40)
    np.testing.assert_array_equal(first, second)


def test_a_new_process_gives_the_same_samples():
    first, _ = synthesise("two red ships")
    espeak._worker(espeak.os.getpid()).close()
    espeak._worker.cache_clear()
    second, _ = synthesise("two red ships")
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "change", [{"voice": "en-gb"}, {"voice": "en-us+f2"}, {"rate_wpm": 120}, {"pitch": 70}, {"pitch_range": 10}]
)
def test_every_argument_changes_the_sound(change):
    plain, _ = synthesise("take two lamps")
    other, _ = synthesise("take two lamps", **change)
    assert len(plain) != len(other) or not np.array_equal(plain, other)


def test_slower_is_longer():
    assert len(synthesise("take two lamps", rate_wpm=100)[0]) > 1.3 * len(synthesise("take two lamps", rate_wpm=200)[0])


@pytest.mark.parametrize("voice", ["xx-nowhere", "en-us+nobody"])
def test_unknown_voice(voice):
    with pytest.raises(ValueError, match=r"`voice` must name an espeak-ng language .* but is .*; try 'en-us'"):
        synthesise("hello", voice)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": " "}, "`text` must hold something to say, but is empty"),
        ({"rate_wpm": 20}, r"`rate_wpm` must be in \[80, 450\], but is 20; 160 is a calm speaker"),
        ({"pitch": 101}, r"`pitch` must be in \[0, 100\], but is 101; 50 is"),
        ({"pitch_range": -1}, r"`pitch_range` must be in \[0, 100\], but is -1; 50 is"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthesise(**{"text": "hello", **arguments})


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    espeak._worker.cache_clear()
    with pytest.raises(
        RuntimeError, match=r"`espeakng-loader`, which is not installed; run: pip install 's3distill\[demo\]'"
    ):
        synthesise("hello")


def test_library_or_data_that_is_not_there(tmp_path):
    import espeakng_loader

    with pytest.raises(RuntimeError, match=r"no\.so does not start .* install it again: pip install"):
        espeak._Worker(str(tmp_path / "no.so"), str(tmp_path))
    with pytest.raises(RuntimeError, match=r"does not start \(espeak_Initialize returned .* for the data in"):
        espeak._Worker(espeakng_loader.get_library_path(), str(tmp_path / "data"))


def test_long_data_path(tmp_path):
    """espeak-ng cuts its data path at 160 bytes, which a virtual environment deep in a home folder exceeds."""
    import espeakng_loader

    deep = tmp_path.joinpath(*["a folder with a long name"] * 8)
    deep.mkdir(parents=True)
    (deep / "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
    worker = espeak._Worker(espeakng_loader.get_library_path(), str(deep / "espeak-ng-data"))
    status, rate, _ = worker.ask({"text": "hi", "voice": "en-us", "rate": 160, "pitch": 50, "range": 50, "seed": 1})
    worker.close()
    assert (status, rate) == (espeak_worker.OK, 22050)

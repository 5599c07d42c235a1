"""Records what lmms-eval's parsers and aggregations make of many replies of judges.

The functions come from lmms-eval's wheel: the five tasks' utils.py are loaded by their paths, with stubs
for the packages that only calls of judges need. Only the call itself is replaced, by a recorded reply.

usage: benchmarks.py WHEEL SEED OUT      writes benchmarks.json

Needs numpy, pandas, scikit-learn and pyyaml. The unit test `measure::parity` reads the result.
"""
import importlib.util
import json
import logging
import os
import random
import sys
import types
import zipfile

WHEEL, SEED, OUT = sys.argv[1], int(sys.argv[2]), sys.argv[3]
REPLIES = 520

folder = OUT + ".wheel"
with zipfile.ZipFile(WHEEL) as wheel:
    for name in wheel.namelist():
        parts = name.split("/")
        tasks = ("wild_vision_bench", "llava-in-the-wild", "llava_wilder", "live_bench", "video_detail_description")
        if parts[:2] == ["lmms_eval", "tasks"] and parts[2] in tasks:
            wheel.extract(name, folder)


def stub(name, **values):
    module = types.ModuleType(name)
    module.__dict__.update(values)
    sys.modules[name] = module
    return module


class Anything:
    """Takes any call."""
    def __init__(self, *_, **__):
        pass

    def __getattr__(self, _):
        return lambda *_, **__: None


logger = Anything()
stub("loguru", logger=logger)
stub("requests", exceptions=types.SimpleNamespace(RequestException=OSError, HTTPError=OSError, JSONDecodeError=ValueError), post=None)
stub("openai", OpenAI=Anything, AzureOpenAI=Anything)
stub("lmms_eval")
stub("lmms_eval.llm_judge", Request=Anything, ServerConfig=Anything, get_server=Anything)


class VerifyResult:
    def __init__(self, score=0.0, is_correct=False, raw_output="", metadata=None):
        self.score, self.is_correct, self.raw_output, self.metadata = score, is_correct, raw_output, metadata or {}


stub("lmms_eval.verifiers", VerificationPipeline=Anything, VerifyResult=VerifyResult)
stub("lmms_eval.verifiers.openai", OpenAIVerifier=Anything)
os.environ.setdefault("HF_HOME", "/nowhere")
logging.disable(logging.CRITICAL)


def task(path, name):
    spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "lmms_eval/tasks", path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Image:
    def convert(self, _):
        return self

    def save(self, *_, **__):
        pass


draw = random.Random(SEED)


def pick(*choices):
    return draw.choice(choices)


def number(low, high, half=True):
    value = draw.randint(low, high)
    return str(value) + (".5" if half and draw.random() < 0.25 else "")


# Varied replies: usual ones, and what models write instead.
def wildvision_reply():
    grade = pick("A>>B", "A>B", "A=B", "B>A", "B>>A")
    other = pick("A>>B", "A>B", "A=B", "B>A", "B>>A")
    return pick(
        "My final verdict is: [[%s]]" % grade, "[[%s]]" % grade, "First, my own answer.\n\nThen [[%s]], so [[%s]]." % (grade, grade),
        "[[%s]] or rather [[%s]]" % (grade, other), "I say %s." % grade, "[[ %s ]]" % grade, "%s, not %s" % (grade, other),
        "Both are good.", "", "[[A]]", "[[B<A]]", "**[[%s]]**" % grade, "[[%s]]\n[[%s]]" % (grade, other), "verdict: [%s]" % grade,
        "[[%s]]" % grade, "[[%s]]" % grade,
    )


def two_reply():
    one, two = number(1, 10), number(1, 10)
    return pick(
        "%s %s" % (one, two), "%s %s\nThe second is better." % (one, two), "%s, %s" % (one, two), "%s,%s\nWhy" % (one, two),
        "%s  %s" % (one, two), "Assistant 1: %s, Assistant 2: %s" % (one, two), "\n%s %s" % (one, two), " %s %s \nx" % (one, two),
        "%s\n%s" % (one, two), "Scores:\n%s %s" % (one, two), "", "They are alike.", "%s/10 %s/10" % (one, two), "%s; %s" % (one, two),
        "%s %s %s" % (one, two, one), "**%s %s**" % (one, two), "%s %s" % (one, two), "%s - %s" % (one, two), "%s-%s" % (one, two),
        "%s." % one, "+%s %s" % (one, two), "%s %s\r\nWhy" % (one, two), "%se0 %s" % (one, two), "%s %s." % (one, two),
    )


def rating_reply():
    rating = draw.randint(0, 10)
    why = pick("It matches.", "It says \"no\".", "Line\none", "\u00fc", "")
    good = json.dumps({"Explanation": why, "Rating": rating})
    return pick(
        good, good, good, json.dumps({"Explanation": why, "Rating": rating + 0.5}), json.dumps({"Rating": rating}),
        "```json\n%s\n```" % good, "Rating: %d" % rating, "", json.dumps({"Rating": rating, "Explanation": why}, indent=4),
        json.dumps({"Explanation": why, "rating": rating}), good[:-1], json.dumps({"Explanation": why, "Rating": rating, "More": [1, {"a": 2}]}),
        json.dumps({"Explanation": why, "Rating": -1}), "[%d]" % rating,
        # Almost JSON.
        "{'Explanation': 'So.', 'Rating': %d}" % rating, good[:-1] + ",}", good.replace(": %d" % rating, ": +%d" % rating),
        good.replace(": %d" % rating, ": 0%d" % rating), good.replace(": %d" % rating, ": %d." % rating),
        "{\"Explanation\": \"a\nb\", \"Rating\": %d}" % rating, "{\"Explanation\": \"\\q\", \"Rating\": %d}" % rating,
        " \n" + good + "\n", good + " # good", good[:-1] + ", \"More\": null}",
    )


def dict_reply():
    score = draw.randint(0, 5)
    return pick(
        "{'score': %d}" % score, "{'score': %d}" % score, "{\"score\": %d}" % score, "{'score': %d.8}" % score, "{'score': '%d'}" % score,
        "{'score': '%d.5'}" % score, "```python\n{'score': %d}\n```" % score, "Score: %d" % score, "%d" % score, "",
        "{'score': %d, 'reason': 'it\\'s fine'}" % score, "{'score': %d}." % score, "{'Score': %d}" % score, "{'score': None}",
        "{'score': %d" % score, "{'score':%d }\n" % score, "{'score': %d, }" % score, "{'score': 7}", "[%d]" % score, "{'score': [%d]}" % score,
        "{'a': {'score': 1}, 'score': %d}" % score,
        # Almost a dict of Python.
        "{'score': true}", "{'score': True}", "{'score': 0%d}" % score, "{'score': (%d)}" % score, "{'score': (%d,)}" % score,
        "{'score': %d} # fine" % score, "{'score': +%d}" % score, "{'score': -%d}" % score, "{\"a\": \"b\nc\", \"score\": %d}" % score,
        "{'score': %d.}" % score, "{'score': %d, 'a': null}" % score, "{'score': %d, 'a': False}" % score,
    )


record = {"seed": SEED, "lmms_eval": os.path.basename(WHEEL)}

# WildVision
module = task("wild_vision_bench/utils.py", "wildvision")
items, results = [], []
for _ in range(REPLIES):
    reply = wildvision_reply()
    module.get_chat_response = lambda *_, **__: (reply, "judge")
    doc = {"instruction": "Why?", "image": Image(), module.BASELINE_MODEL_NAME: "So."}
    made = module.wild_vision_process_results(doc, ["No."])
    results.append(made)
    items.append({"reply": reply, "value": made["raw_scores"]["final_score"], "label": made["judgements_tie"]["judgement"]})
of = lambda key: [made[key] for made in results]
metrics = {
    "score": module.wild_vision_aggregation_elo_scores(of("elo_scores")),
    "win_rate": module.wild_vision_aggregation_win_rates(of("win_rates")),
    "mean": module.wild_vision_aggregation_raw_scores(of("raw_scores")),
    "label better": module.wild_vision_aggregation_judgements_better(of("judgements_better")),
    "label much better": module.wild_vision_aggregation_judgements_better_plus(of("judgements_better_plus")),
    "label worse": module.wild_vision_aggregation_judgements_worse(of("judgements_worse")),
    "label much worse": module.wild_vision_aggregation_judgements_worse_plus(of("judgements_worse_plus")),
    "label tie": module.wild_vision_aggregation_judgements_tie(of("judgements_tie")),
    "label unclear": module.wild_vision_aggregation_judgements_unclear(of("judgements_unclear")),
}
record["wildvision"] = {"items": items, "metrics": {name: float(value) for name, value in metrics.items()}}

# LLaVA-W
module = task("llava-in-the-wild/utils.py", "llava_w")
items, results = [], []
for number_of in range(REPLIES):
    reply = two_reply()
    category = ("conv", "detail", "complex")[number_of % 3]
    module._get_pipeline = lambda: lambda **_: module._parse_comparative_scores(reply)
    doc = {"question": "Why?", "gpt_answer": "So.", "caption": ["A cat."], "category": category, "question_id": number_of}
    made = module.llava_process_results(doc, ["No."])
    results.append(made)
    items.append({"reply": reply, "category": category, "scores": made["gpt_eval_llava_all"]["scores"]})
record["llava_w"] = {"items": items, "metrics": {
    name: module.llava_aggregation([made["gpt_eval_llava_" + name] for made in results], name)
    for name in ("all", "conv", "detail", "complex")
}}

# LLaVA-Wilder
module = task("llava_wilder/utils.py", "llava_wilder")
module.image_to_base64 = lambda _: ""
items, results = [], []
for _ in range(REPLIES):
    reply = two_reply()
    module.get_chat_response = lambda *_, **__: (reply, "judge")
    made = module.llava_process_results({"Question": "Why?", "Answer": "So.", "image": Image()}, ["No."])
    results.append(made["gpt_eval_llava_all"])
    items.append({"reply": reply, "scores": made["gpt_eval_llava_all"]["scores"]})
record["llava_wilder"] = {"items": items, "metrics": {"all": module.llava_all_aggregation(results)}}

# LiveBench: the reply is read in the function that calls the judge, so the client is replaced.
module = task("live_bench/utils.py", "livebench")
module.image_to_base64 = lambda _: ""
sys.stdout = open(os.devnull, "w")


class Client:
    def __init__(self, *_, **__):
        message = types.SimpleNamespace(content=None)
        create = lambda **_: types.SimpleNamespace(choices=[types.SimpleNamespace(message=types.SimpleNamespace(content=reply))])
        self.chat = types.SimpleNamespace(completions=types.SimpleNamespace(create=create))


module.openai.OpenAI = Client
items, results = [], []
for number_of in range(REPLIES):
    reply = rating_reply()
    answer = "" if draw.random() < 0.05 else "No."
    subtask = module.SUBTASKS[number_of % 5]
    doc = {"images": [Image()], "question": "Why?", "answer": "So.", "criteria": "None.", "subtask": subtask, "id": number_of}
    made = module.livebench_process_results(doc, [answer])["gpt4_eval_score"]
    results.append(made)
    items.append({"reply": reply, "answer": answer, "category": subtask, "value": made["rating"]})
total = module.livebench_aggregate_results(results)
sys.stdout = sys.__stdout__
by = {}
for made in results:
    if made["rating"] != -1:
        by.setdefault(made["subtask"], []).append(made["rating"] / 10)
record["livebench"] = {"items": items, "metrics": {"all": total, **{name: sum(all) / len(all) * 100 for name, all in by.items()}}}

# Video Detailed Description
module = task("video_detail_description/utils.py", "video_detail")
items, results = [], []
for _ in range(REPLIES):
    reply = dict_reply()
    # `get_eval_generic` strips a reply.
    module.get_eval_generic = lambda *_, **__: (reply.strip(), "judge")
    doc = {"question": "Why?", "answer": "So.", "video_name": "v"}
    made = module.video_detail_description_process_results_generic(doc, ["No."])["gpt_eval_score"]
    results.append(made)
    items.append({"reply": reply, "value": made["score"]})
record["video_detail"] = {"items": items, "metrics": {"all": module.video_detail_description_aggregate_score(results, None)}}

# What lmms-eval makes of the cases in which it is at fault.
faults = []


def fault(case, made):
    try:
        faults.append({"case": case, "lmms_eval": repr(made())})
    except Exception as error:
        faults.append({"case": case, "lmms_eval": type(error).__name__})


wilder, wild = sys.modules.get("x"), None
wilder = task("llava_wilder/utils.py", "llava_wilder_again")
fault("LLaVA-W, Wilder: every judge call fails", lambda: wilder.llava_all_aggregation([{"scores": [-1, -1]}] * 60))
fault("LLaVA-W, Wilder: 30 of 60 calls fail, the others are 10 9", lambda: wilder.llava_all_aggregation([{"scores": [-1, -1]}, {"scores": [10.0, 9.0]}] * 30))
wild = task("wild_vision_bench/utils.py", "wildvision_again")
win = {"model_a": wild.BASELINE_MODEL_NAME, "model_b": "evaluation_model", "winner": "model_b"}
fault("WildVision: every battle is won (elo_scores)", lambda: float(wild.wild_vision_aggregation_elo_scores([win] * 20)))
reply = json.dumps({"Explanation": "x", "Rating": "8"})
live = task("live_bench/utils.py", "livebench_again")
live.image_to_base64 = lambda _: ""
live.openai.OpenAI = Client
doc = {"images": [Image()], "question": "Why?", "answer": "So.", "criteria": "None.", "subtask": live.SUBTASKS[0], "id": 1}
fault("LiveBench: a rating in quotes, as its own prompt shows it", lambda: live.livebench_process_results(doc, ["No."]))
sys.stdout = open(os.devnull, "w")
fault("LiveBench: every judge call fails", lambda: live.livebench_aggregate_results([{"rating": -1, "subtask": live.SUBTASKS[0]}]))
sys.stdout = sys.__stdout__
video = task("video_detail_description/utils.py", "video_again")
fault("Video Detailed Description: {'score': 4.8}", lambda: video.parse_score("{'score': 4.8}"))
fault("Video Detailed Description: {'score': 7} of 5", lambda: video.parse_score("{'score': 7}"))
fault("Video Detailed Description: a fenced reply with 4", lambda: video.parse_score("```python\n{'score': 4}\n```"))
record["faults"] = faults

with open(OUT, "w", encoding="utf-8") as file:
    json.dump(record, file, ensure_ascii=True, indent=None, separators=(",", ":"))
    file.write("\n")
print("wrote", OUT, os.path.getsize(OUT), "bytes")

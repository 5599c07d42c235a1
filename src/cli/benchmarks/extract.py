# Extracts the judge texts of benchmarks from the wheel of lmms-eval, as templates.
#
# Nothing of the wheel is run: its files are parsed with `ast`, and strings are taken from the trees.
# Prints a JSON object of the templates by the names of their files.
#
# usage: extract.py WHEEL
import ast
import json
import re
import sys
import zipfile

wheel = zipfile.ZipFile(sys.argv[1])


def tree(path):
    return ast.parse(wheel.read("lmms_eval/tasks/" + path).decode("utf-8"))


def text_of(node, names):
    """Returns a string of the source as a template; `names` maps its fields to variables."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return plain(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = []
        for part in node.values:
            if isinstance(part, ast.Constant):
                parts.append(plain(part.value))
            else:
                parts.append("{{ " + names[ast.unparse(part.value)] + " }}")
        return "".join(parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, names) + text_of(node.right, names)
    raise SystemExit("unexpected text: " + ast.dump(node)[:200])


def plain(text):
    """Escapes what a template would interpret."""
    if re.search(r"\{\{|\{%|\{#", text):
        return "{% raw %}" + text + "{% endraw %}"
    return text


def formatted(text, names):
    """Returns a text for `str.format` as a template."""
    parts = re.split(r"(\{\{|\}\}|\{\w+\})", text)
    made = []
    for part in parts:
        if part in ("{{", "}}"):
            made.append(part[0])
        elif re.fullmatch(r"\{\w+\}", part):
            made.append("{{ " + names[part[1:-1]] + " }}")
        else:
            made.append(plain(part))
    return "".join(made)


def assigned(module, name):
    for node in module.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return node.value
    raise SystemExit("no " + name)


def function(module, name):
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise SystemExit("no " + name)


def local(node, name):
    """Returns the value that is assigned to a variable in a function."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assign) and getattr(inner.targets[0], "id", None) == name:
            return inner.value
    raise SystemExit("no " + name)


texts = {}

wildvision = tree("wild_vision_bench/utils.py")
texts["wildvision_system.txt"] = plain(ast.literal_eval(assigned(wildvision, "system_prompt")))
texts["wildvision_user.txt"] = formatted(
    ast.literal_eval(assigned(wildvision, "prompt_template")),
    {"question_1": "question", "answer_1": "first", "answer_2": "second"},
)

rules = json.loads(wheel.read("lmms_eval/tasks/llava-in-the-wild/rule.json").decode("utf-8"))
rules = {name[len("llava_bench_"):]: rule for name, rule in rules.items() if name.startswith("llava_bench_")}
roles = {rule["role"] for rule in rules.values()}
if len(roles) != 1:
    raise SystemExit("several roles")
role = roles.pop()
content = local(function(tree("llava-in-the-wild/utils.py"), "llava_process_results"), "content")
rule = "".join(
    "{%% %s row.category == '%s' %%}%s" % ("if" if number == 0 else "elif", name, plain(rules[name]["prompt"]))
    for number, name in enumerate(sorted(rules))
)
made = text_of(content, {
    "context": "captions|join('\\n')",
    "question": "question",
    "role": "ROLE",
    "ans1": "first",
    "ans2": "second",
    "prompt": "RULE",
})
texts["llava_w.txt"] = made.replace("{{ ROLE }}", role).replace("{{ RULE }}", rule + "{% endif %}")

wilder = tree("llava_wilder/utils.py")
content = local(function(wilder, "llava_process_results"), "content")
made = text_of(content, {"question": "question", "ans1": "first", "ans2": "second", "judge_rules": "RULES"})
texts["llava_wilder.txt"] = made.replace("{{ RULES }}", plain(ast.literal_eval(assigned(wilder, "judge_rules"))))

for name, path in (("2406", "live_bench/utils.py"), ("2409", "live_bench/utils_v2.py")):
    texts["livebench_%s.txt" % name] = formatted(
        ast.literal_eval(assigned(tree(path), "_PROMPT_WITH_IMAGE")),
        {"prompt": "question", "generation": "answer", "reference": "reference", "criteria": "row.criteria"},
    )

messages = local(function(tree("video_detail_description/utils.py"), "get_eval_generic"), "messages")
for message in messages.elts:
    pairs = dict(zip((key.value for key in message.keys), message.values))
    name = "video_detail_%s.txt" % pairs["role"].value
    texts[name] = text_of(pairs["content"], {"question": "question", "answer": "reference", "pred": "answer"})

prompt = local(function(tree("vl_rewardbench/utils.py"), "get_prompt"), "prompt_str")
texts["vl_rewardbench.txt"] = text_of(prompt, {
    "data_obj['query']": "question",
    "answers[0]": "first",
    "answers[1]": "second",
})
texts["multimodal_rewardbench.txt"] = formatted(
    ast.literal_eval(assigned(tree("multimodal_rewardbench/utils.py"), "judge_prompt")),
    {"question": "question", "answer_a": "first", "answer_b": "second"},
)

# A template loses the last line break of its file.
print(json.dumps({name: text + "\n" for name, text in texts.items()}))

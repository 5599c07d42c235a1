-- The answers to the held-out prompts, beside those of the round before and beside the known ones.
with answered as (
  select prompt_id, candidate, text from {answers} where round = $round
), before as (
  select prompt_id, candidate, text from {answers} where round = $round - 1
)
select 'heldout_unchanged' as metric, avg(case when a.text = b.text then 1.0 else 0.0 end) as value, count(*) as n
from answered a join before b on b.prompt_id = a.prompt_id and b.candidate = a.candidate
union all
select 'heldout_right', avg(case when lower(trim(a.text)) = lower(trim(p.answer)) then 1.0 else 0.0 end), count(*)
from answered a join {prompts} p on p.prompt_id = a.prompt_id where p.answer is not null

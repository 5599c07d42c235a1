-- Agreement with the known answers of the training prompts, where there are any: of the answers, and
-- of the judge, which should reward a right answer more than a wrong one to the same prompt.
with judged as (
  select a.prompt_id, r.reward, lower(trim(a.text)) = lower(trim(p.answer)) as is_right
  from {answers} a
  join {prompts} p on p.prompt_id = a.prompt_id
  join {rewards} r on r.round = a.round and r.prompt_id = a.prompt_id and r.candidate = a.candidate
  where a.round = $round and p.answer is not null
), compared as (
  select case when one.reward > other.reward then 1.0 when one.reward = other.reward then 0.5 else 0.0 end as agrees
  from judged one join judged other on other.prompt_id = one.prompt_id
  where one.is_right and not other.is_right
)
select 'right' as metric, avg(case when is_right then 1.0 else 0.0 end) as value, count(*) as n from judged
union all
select 'judge_right', avg(agrees), count(*) from compared

-- The labels of people so far: how often two annotators of the same two answers gave the same verdict.
with latest as (
  select "by", prompt_id, left_digest, right_digest, said,
         row_number() over (partition by "by", prompt_id, least(left_digest, right_digest), greatest(left_digest, right_digest) order by at desc, id desc, said = 'undone' desc) as age
  from {labels}
), verdicts as (
  select "by", prompt_id, least(left_digest, right_digest) as one, greatest(left_digest, right_digest) as other,
         case said when 'left' then left_digest when 'right' then right_digest else said end as verdict
  from latest where age = 1 and said not in ('skip', 'undone')
)
select 'labelers_agree' as metric, avg(case when a.verdict = b.verdict then 1.0 else 0.0 end) as value, count(*) as n
from verdicts a
join verdicts b on b.prompt_id = a.prompt_id and b.one = a.one and b.other = a.other and a."by" < b."by"
